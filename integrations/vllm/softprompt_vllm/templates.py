"""A task's template: how a text becomes the token ids that the task was trained on."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any

from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.guarded_text import Part, guarded, ids_behind, pieces_of, token_names

# Marks where what is said in a turn begins and ends. Unicode keeps this character free for such uses.
_EDGE = "\ufdd1"


@dataclass(frozen=True)
class Template:
    """The part of a task's template that stands in front of the answer.

    Attributes:
        text: the model's input; `{column}` stands for a value.
        chat: whether the text is what the user says in the tokenizer's chat template.
        system: what the system says in a chat; None leaves it to the chat template.
        special_tokens: whether the tokenizer's added tokens are read in a client's text; if False, they stay text.
    """

    text: str
    chat: bool = False
    system: str | None = None
    special_tokens: bool = False

    def __post_init__(self) -> None:
        """Raise a `SoftPromptError` for a text that holds more than plain `{column}` fields."""
        try:
            fields = [found[1:] for found in string.Formatter().parse(self.text) if found[1] is not None]
        except ValueError as error:
            raise SoftPromptError(
                f"the template {self.text!r} has other braces than {{column}}; save it anew"
            ) from error
        if any(not name or spec or conversion or "[" in name or ".__" in name for name, spec, conversion in fields):
            raise SoftPromptError(f"the template {self.text!r} may only hold {{column}} fields; save it anew")

    def render(self, text: str) -> str:
        r"""The template with `text` for its one column.

        Raises:
            SoftPromptError: a template of no column, or of several.

        Example:
            >>> Template("{review}\nSentiment:").render("Great {sic}.")
            'Great {sic}.\nSentiment:'
        """
        return "".join(words for words, _ in self._parts(text))

    def _parts(self, text: str) -> list[Part]:
        columns = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        if len(columns) != 1:
            raise SoftPromptError(
                f"a text alone fills a template of one column, and {self.text!r} has {len(columns)}; send the token "
                "ids of the whole text, or start the server with SOFTPROMPT_RAW=1 and send the whole text"
            )
        parts = []
        for words, name, _, _ in string.Formatter().parse(self.text):
            parts += [(words, False)] if name is None else [(words, False), (text, True)]
        return parts

    def token_ids(self, tokenizer: Any, text: str) -> list[int]:
        """The token ids of `text` in this template, as training makes them.

        Args:
            tokenizer: a Hugging Face tokenizer.
            text: the text; it fills the template's one column.

        Raises:
            SoftPromptError: a template of no column or of several, or a tokenizer without a chat template.
        """
        names = None if self.special_tokens else token_names(tokenizer)
        rendered = guarded(self._parts(text), names)
        first, *others = pieces_of(self._chat(rendered, tokenizer, names) if self.chat else rendered)
        ids = list(tokenizer(first, **({"add_special_tokens": False} if self.chat else {}))["input_ids"])
        if others:
            inner = list(tokenizer(first, add_special_tokens=False)["input_ids"])
            place = _end_of(inner, ids)
            ids[place:place] = ids_behind(tokenizer, others)
        # The answer follows, so no end-of-text token stands behind the text.
        return ids[:-1] if not self.chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids

    def _chat(self, text: str, tokenizer: Any, names: re.Pattern[str] | None) -> str:
        """What the user says in the tokenizer's chat template."""
        if getattr(tokenizer, "chat_template", None) is None:
            raise SoftPromptError(
                "the task was trained on chats, and the tokenizer has no chat template; serve the tokenizer it was "
                "trained with"
            )
        says = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*says, {"role": "user", "content": text}]
        chat = _written(turns, tokenizer)
        if names is None:
            return chat
        marked = _written([{**turn, "content": _with_edges(turn["content"])} for turn in turns], tokenizer)
        if marked.replace(_EDGE, "") != chat.replace(_EDGE, ""):
            return chat
        segments = marked.split(_EDGE)
        return guarded([part for words in segments for part in ((words, False), ("", True))][:-1], names)


def _written(turns: list[dict[str, str]], tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _with_edges(content: str) -> str:
    said = content.strip()
    before, _, after = content.partition(said) if said else (content, "", "")
    return f"{before}{_EDGE}{said}{_EDGE}{after}"


def _end_of(inner: list[int], ids: list[int]) -> int:
    """Where the ids of a text end among these with what the tokenizer puts around it."""
    size = len(inner)
    return next((at + size for at in range(len(ids) - size + 1) if ids[at : at + size] == inner), len(ids))
