"""A task's template: how a text becomes the token ids that the task was trained on."""

from __future__ import annotations

import re
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
        special_tokens: whether the tokenizer's special tokens are read in a client's text; if False, they stay text.
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
        columns = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        if len(columns) != 1:
            raise SoftPromptError(
                f"a text alone fills a template of one column, and {self.text!r} has {len(columns)}; send the token "
                "ids of the whole text, or start the server with SOFTPROMPT_RAW=1 and send the whole text"
            )
        return "".join(
            words + ("" if name is None else text) for words, name, _, _ in string.Formatter().parse(self.text)
        )

    def token_ids(self, tokenizer: Any, text: str) -> list[int]:
        """The token ids of `text` in this template, as training makes them.

        Args:
            tokenizer: a Hugging Face tokenizer.
            text: the text; it fills the template's one column.

        Raises:
            SoftPromptError: a template of no column or of several, or a tokenizer without a chat template.
        """
        first, *others = self._whole(text if self.special_tokens else _guarded(text, tokenizer), tokenizer).split(_CUT)
        if self.chat:
            ids = _ids_of(first, tokenizer)
        else:
            ids = list(tokenizer(first)["input_ids"])
            # The answer follows, so no end-of-text token stands behind the text.
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        return [*ids, *(token for piece in others for token in _ids_behind(piece, tokenizer))]

    def _whole(self, text: str, tokenizer: Any) -> str:
        """The template with `text`, in the tokenizer's chat template if it is a chat."""
        rendered = self.render(text)
        if not self.chat:
            return rendered
        if getattr(tokenizer, "chat_template", None) is None:
            raise SoftPromptError(
                "the task was trained on chats, and the tokenizer has no chat template; serve the tokenizer it was "
                "trained with"
            )
        says = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [*says, {"role": "user", "content": rendered}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


# Where a text is cut, so that the name of a special token in it stays text. Unicode keeps this character free.
_CUT = "\ufdd0"


def _guarded(text: str, tokenizer: Any) -> str:
    """A client's text, cut inside each name of a special token, as the library cuts it in training."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    names = {str(token) for token in added.values() if token.special} | {*getattr(tokenizer, "all_special_tokens", ())}
    listed = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
    return _cut(text, re.compile("|".join(map(re.escape, listed)))) if listed else text


def _cut(text: str, tokens: re.Pattern[str]) -> str:
    pieces = []
    while (found := tokens.search(text)) is not None:
        inside = next((place for place, sign in enumerate(found[0]) if place and sign.isalnum()), 1)
        pieces.append(_cut(text[: found.start() + inside], tokens))
        text = text[found.start() + inside :]
    return _CUT.join([*pieces, text])


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids_behind(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text behind another one, where no tokenizer puts a space or a start token in front of it."""
    alone = _ids_of(text, tokenizer)
    known: list[list[int]] = []
    for front in (":", "a", "\n"):
        head, whole = _ids_of(front, tokenizer), _ids_of(front + text, tokenizer)
        behind = whole[len(head) :]
        if whole[: len(head)] == head and behind:
            if behind == alone or behind in known:
                return behind
            known.append(behind)
    return alone
