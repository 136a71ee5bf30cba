"""What a call gives back: answers in the order of its rows, and why a row has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Found = TypeVar("Found")
FinishReason = Literal["stop", "length", "label"]

# Why a row has no answer whose numbers the model has lost, as by an overflow in float16.
NOT_FINITE = "the model's logits of this row are not finite; load the base in bfloat16 or float32"


@dataclass(frozen=True)
class Answer:
    """The answer to a row of a classification task.

    Attributes:
        label: the likeliest label, as it stands in the task's template.
        probabilities: the probability of each label among the task's labels, in the order of the template; they sum
            to 1.

    Example:
        >>> answer = Answer(" positive", {" positive": 0.75, " negative": 0.25})
        >>> max(answer.probabilities, key=answer.probabilities.get) == answer.label
        True
    """

    label: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Written:
    """The text of an answer.

    Attributes:
        text: the text, without what ended it.
        token_ids: its token ids, without the token that ended it.
        finish_reason: "stop" if the text came to its end, "length" if it was cut at the most tokens, "label" if it is
            the likeliest label.
        probabilities: of each label, as in `Answer`; None for free text.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    probabilities: Mapping[str, float] | None = None


class Answers(list[Found | None]):
    """The answers to the requests of a call, in the order of the requests; None for a request without an answer.

    Attributes:
        failures: why a request has no answer, by the index of the request.
    """

    def __init__(self, answers: Iterable[Found | None], failures: dict[int, str]) -> None:
        super().__init__(answers)
        self.failures = failures


class TextAnswers(Answers[str]):
    """Answers as texts without surrounding space, with what is known of each.

    Attributes:
        failures: why a row has no answer, by the index of the row.
        token_ids: the token ids of each answer as it was written, without the token that ended it; None where there is
            no answer.
        finish_reasons: "stop" if an answer came to its end, "length" if it was cut at the most tokens, "label" if it is
            the likeliest label; None where there is no answer.
        probabilities: of each label of the row's task, as in `Answer`; None for free text, and where there is no
            answer.

    Example:
        >>> found = TextAnswers.of(Answers([Written(" fine", [7], "stop"), None], {1: "the text has no tokens"}))
        >>> found, found.token_ids, found.finish_reasons, found.failures
        (['fine', None], [[7], None], ['stop', None], {1: 'the text has no tokens'})
    """

    token_ids: list[list[int] | None]
    finish_reasons: list[FinishReason | None]
    probabilities: list[Mapping[str, float] | None]

    @classmethod
    def of(cls, found: Answers[Written]) -> TextAnswers:
        """The texts of what was written."""
        answers = cls([None if one is None else one.text.strip() for one in found], found.failures)
        answers.token_ids = [None if one is None else one.token_ids for one in found]
        answers.finish_reasons = [None if one is None else one.finish_reason for one in found]
        answers.probabilities = [None if one is None else one.probabilities for one in found]
        return answers
