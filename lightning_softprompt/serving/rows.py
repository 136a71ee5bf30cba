"""What the engine works on: rows to be answered, and the parts in which their answers come."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.growing_text import GrowingText
from lightning_softprompt.serving.sampling import Choice, Sampler

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

_NOT_FINITE = "the model's logits of this row are not finite"
_LEAST = sys.float_info.min  # JSON knows no logarithm of 0
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token of an answer, for those who ask for log-probabilities.

    Attributes:
        text: its text by itself.
        logprob: its log-probability.
        likeliest: the texts of the likeliest tokens, or of all labels, with their log-probabilities.
        begins_at: where its text begins in the answer.
    """

    text: str
    logprob: float
    likeliest: Sequence[tuple[str, float]]
    begins_at: int


@dataclass(frozen=True)
class Part:
    """A part of an answer: what has come since the part before.

    Attributes:
        text: the text that has come.
        tokens: the tokens that have come; none unless log-probabilities were asked for.
        finish_reason: "stop" or "length" in the last part.
        failure: why there is no answer, in a last part without `finish_reason`.
        status: the HTTP status of that failure.
    """

    text: str = ""
    tokens: Sequence[Token] = ()
    finish_reason: FinishReason | None = None
    failure: str | None = None
    status: int = 200

    @property
    def is_last(self) -> bool:
        """Whether no part follows."""
        return self.finish_reason is not None or self.failure is not None


@dataclass
class Row:
    """A row that waits for its answer, or gets it.

    Attributes:
        request: its ids, task, and length when its answer is complete.
        prompts: the prompts that its template and its ids belong to, and no others.
        deliver: takes the parts of the answer, in the thread of the model.
        is_cancelled: whether nobody waits for the answer any more. Any thread may set it.
        completion_tokens: the number of tokens of the answer so far, the one that ended it included.
        has_ended: whether the last part was delivered.
        first_at: when the first token came, by `time.perf_counter()`.
    """

    request: Request
    prompts: SoftPrompts
    deliver: Callable[[Part], None]
    is_cancelled: bool = False
    completion_tokens: int = field(default=0, init=False)
    has_ended: bool = field(default=False, init=False)
    first_at: float | None = field(default=None, init=False)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.has_ended or self.is_cancelled

    @property
    def prompt_tokens(self) -> int:
        """The number of virtual tokens and tokens of the text in its template."""
        task = self.request.task
        return len(self.request.ids) + (0 if task is None else len(self.prompts[task]))

    def fail(self, reason: str, status: int = 500) -> None:
        """End without an answer."""
        if not self.has_ended:
            self.has_ended = True
            self.deliver(Part(failure=reason, status=status))

    def _note(self, tokens: int) -> None:
        self.first_at = self.first_at or time.perf_counter()
        self.completion_tokens += tokens


@dataclass
class LabelRow(Row):
    """A row whose answer is a label.

    Attributes:
        labels: the labels, in the order of their ids in the request, without surrounding space.
        tells_all: whether the probabilities of all labels are told.
    """

    labels: Sequence[str] = ()
    tells_all: bool = False

    def answer(self, probabilities: Sequence[float]) -> None:
        """Take the likeliest label; `probabilities` are those of the labels."""
        if not math.isfinite(sum(probabilities)):
            return self.fail(_NOT_FINITE)
        order = sorted(range(len(self.labels)), key=lambda place: -probabilities[place])
        told = [(self.labels[place], math.log(max(probabilities[place], _LEAST))) for place in order]
        (label, logprob), *_ = told
        self._note(len(self.request.labels[order[0]]))
        self.has_ended = True
        self.deliver(Part(label, [Token(label, logprob, told, 0)] if self.tells_all else [], "stop"))


@dataclass
class TextRow(Row):
    """A row whose answer is free text.

    Attributes:
        sampler: how its tokens are chosen.
        max_tokens: the most tokens of its answer.
        growing: the text of the answer.
        tokenizer: writes single tokens, for log-probabilities.
        streams: whether the answer is delivered in parts, as it comes, and not whole.
        last: the token that came last.
    """

    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 1
    growing: GrowingText = field(default_factory=lambda: GrowingText(None))
    tokenizer: Any = None
    streams: bool = False
    last: int = field(default=0, init=False)
    _untold: list[Token] = field(default_factory=list, init=False, repr=False)

    def accept(self, choice: Choice | None) -> None:
        """Take the next token, or end where none could be chosen."""
        if choice is None:
            return self.fail(_NOT_FINITE)
        self._note(1)
        self.last = choice.token
        begins_at = len(self.growing.text)
        is_end = choice.token in self.sampler.end_tokens
        if not is_end:
            self.growing.add(choice.token)
            if choice.logprob is not None:
                self._untold.append(self._token(choice, begins_at))
        if is_end or self.growing.is_stopped:
            self._tell("stop")
        elif self.completion_tokens >= self.max_tokens:
            self._tell("length")
        elif self.streams:
            self._tell(None)

    def _tell(self, finish_reason: FinishReason | None) -> None:
        if finish_reason is not None:
            self.growing.end()
            # A stop string may have come with what was held back.
            finish_reason = "stop" if self.growing.is_stopped else finish_reason
        text = self.growing.take()
        until = self.growing.told if finish_reason is None or self.growing.is_stopped else None
        tokens = [token for token in self._untold if until is None or token.begins_at < until]
        del self._untold[: len(tokens)]
        if text or tokens or finish_reason is not None:
            begin = self.growing.begins_at
            told = [Token(token.text, token.logprob, token.likeliest, token.begins_at - begin) for token in tokens]
            self.has_ended = finish_reason is not None
            self.deliver(Part(text, told, finish_reason))

    def _token(self, choice: Choice, begins_at: int) -> Token:
        assert choice.logprob is not None
        likeliest = [(self._text(token), logprob) for token, logprob in choice.likeliest]
        return Token(self._text(choice.token), choice.logprob, likeliest, begins_at)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))
