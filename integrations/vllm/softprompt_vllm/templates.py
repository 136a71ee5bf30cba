"""A task's template: how a text becomes the token ids that the task was trained on."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from softprompt_vllm.errors import SoftPromptError


@dataclass(frozen=True)
class Template:
    """The part of a task's template that stands in front of the answer.

    Attributes:
        text: the model's input; `{column}` stands for a value.
        chat: whether the text is what the user says in the tokenizer's chat template.
        system: what the system says in a chat; None leaves it to the chat template.
    """

    text: str
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Raise a `SoftPromptError` for a text that holds more than plain `{column}` fields."""
        try:
            fields = [found[1:] for found in string.Formatter().parse(self.text) if found[1] is not None]
        except ValueError as error:
            raise SoftPromptError(
                f"the template {self.text!r} has other braces than {{column}}; save it anew"
            ) from error
        # A conversion, a format or an attribute could read more of a value than its text.
        if any(spec or conversion or not str(name).isidentifier() for name, spec, conversion in fields):
            raise SoftPromptError(f"the template {self.text!r} may only hold {{column}} fields; save it anew")

    def render(self, text: str) -> str:
        r"""The template with `text` for its one column.

        Raises:
            SoftPromptError: a template of no column, or of several.

        Example:
            >>> Template("{review}\nSentiment:").render("Great {sic}.")
            'Great {sic}.\nSentiment:'
        """
        columns = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        if len(columns) != 1:
            raise SoftPromptError(
                f"a text alone fills a template of one column, and {self.text!r} has {len(columns)}; send the token "
                "ids of the whole text, or start the server with SOFTPROMPT_RAW=1 and send the whole text"
            )
        return self.text.format_map(dict.fromkeys(columns, text))

    def token_ids(self, tokenizer: Any, text: str) -> list[int]:
        """The token ids of `text` in this template, as training makes them.

        Args:
            tokenizer: a Hugging Face tokenizer.
            text: the text; it fills the template's one column.

        Raises:
            SoftPromptError: a template of no column or of several, or a tokenizer without a chat template.
        """
        rendered = self.render(text)
        if not self.chat:
            ids = list(tokenizer(rendered)["input_ids"])
            # The answer follows, so no end-of-text token stands behind the text.
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        if getattr(tokenizer, "chat_template", None) is None:
            raise SoftPromptError(
                "the task was trained on chats, and the tokenizer has no chat template; serve the tokenizer it was "
                "trained with"
            )
        says = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*says, {"role": "user", "content": rendered}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
