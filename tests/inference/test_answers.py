"""What a call gives back."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_softprompt import Answer
from lightning_softprompt.inference.answers import Answers, TextAnswers, Written


def test_an_answer_does_not_change() -> None:
    answer = Answer(" positive", {" positive": 0.75, " negative": 0.25})
    assert answer == Answer(label=" positive", probabilities={" negative": 0.25, " positive": 0.75})
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.label = " negative"  # type: ignore[misc]


def test_texts_have_no_surrounding_space_and_keep_what_is_known_of_them() -> None:
    found = Answers([Written(" fine\n", [7, 8], "stop"), None, Written(" a b", [9], "length")], {1: "no tokens"})
    answers = TextAnswers.of(found)
    assert answers == ["fine", None, "a b"] and answers.failures == {1: "no tokens"}
    assert answers.token_ids == [[7, 8], None, [9]] and answers.finish_reasons == ["stop", None, "length"]
