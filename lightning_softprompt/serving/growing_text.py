"""The text of an answer while its tokens come: whole characters, and stop strings wherever they begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How many tokens are decoded at once to find the text of a new one, and how many of them stay as its context.
_WINDOW = 64
_CONTEXT = 8


class GrowingText:
    """The text of an answer while its tokens come.

    A character may be made of several tokens, and a stop string may begin and end inside of tokens. So part of the text
    is held back until it is known what it belongs to. The time for a token does not depend on how many came before.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stop: the texts before which the answer ends.
        strips: whether space around the answer is left out.

    Attributes:
        text: all text so far, up to a stop string, with the space around it.
        is_stopped: whether a stop string has come.
        told: how many characters of `text` were taken, the space in front of it included.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({" a": 0, " b": 1, " c": 2}))
        >>> inner.decoder = decoders.Fuse()
        >>> growing = GrowingText(PreTrainedTokenizerFast(tokenizer_object=inner), stop=["b c"])
        >>> told = []
        >>> for token in (0, 1, 2):
        ...     growing.add(token)
        ...     told.append(growing.take())
        >>> told, growing.is_stopped
        ([' a', ' ', ''], True)
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), strips: bool = False) -> None:
        self.text = ""
        self.is_stopped = False
        self.told = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._strips = strips
        self._ids: list[int] = []  # those of the window
        self._decoded = ""  # the part of their text that is in `text`
        self._has_ended = False

    @property
    def begins_at(self) -> int:
        """Where in `text` the answer begins: behind the space that is left out."""
        return len(self.text) - len(self.text.lstrip()) if self._strips else 0

    def add(self, token: int) -> None:
        """Add a token. Nothing may be added once a stop string has come."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if decoded.endswith("\ufffd"):
            return  # a character of several tokens is no character yet
        self._grow(decoded)
        if len(self._ids) >= _WINDOW:
            self._ids = self._ids[-_CONTEXT:]
            self._decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def end(self) -> None:
        """No token follows: what was held back is text, too, as it stands."""
        self._has_ended = True
        if self._ids and not self.is_stopped:
            self._grow(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def take(self) -> str:
        """The text that is certain by now, and was not taken before."""
        certain = len(self.text)
        if not (self._has_ended or self.is_stopped):
            certain -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        if self._strips:
            certain = len(self.text[:certain].rstrip())
        begin = max(self.told, self.begins_at)
        if certain <= begin:
            return ""
        self.told = certain
        return self.text[begin:certain]

    def _grow(self, decoded: str) -> None:
        known = len(self.text)
        self.text += decoded[len(self._decoded) :]
        self._decoded = decoded
        places = (self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stop)
        found = min((place for place in places if place >= 0), default=-1)
        if found >= 0:
            self.is_stopped = True
            self.text = self.text[:found]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, and goes on behind it."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
