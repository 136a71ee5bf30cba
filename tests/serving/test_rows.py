"""Rows and the parts of their answers."""

from __future__ import annotations

import math

from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.rows import LabelRow, Part
from lightning_softprompt.serving.sampling import Choice
from tests import tiny
from tests.inference.tasks import words
from tests.serving.helpers import RAGGED, Asked, RowMaking, prompts_of


def asked(new: int, **options) -> Asked:
    model = tiny.tiny_model()
    return RowMaking(model, prompts_of(RAGGED, model))([6, 7], "task3", new, **options)


def feed(one: Asked, *tokens: int) -> None:
    for token in tokens:
        one.row.accept(Choice(token, -0.5, [(token, -0.5), (9, -1.0)]))


def test_an_answer_comes_whole_or_in_parts() -> None:
    whole, streamed = asked(3, logprobs=None), asked(3, logprobs=None, streams=True)
    for one in (whole, streamed):
        for token in (10, 11, 12):
            one.row.accept(Choice(token))
    assert whole.parts == [Part("w10w11w12", [], "length")]
    assert streamed.parts == [Part("w10", []), Part("w11", []), Part("w12", [], "length")]
    assert whole.row.has_ended and whole.row.completion_tokens == 3 and whole.row.prompt_tokens == 3 + 2


def test_an_end_token_is_no_text_and_counts() -> None:
    one = asked(5, end_tokens=frozenset([2]))
    feed(one, 10, 2)
    (part,) = one.parts
    assert (part.text, part.finish_reason, one.row.completion_tokens) == ("w10", "stop", 2)
    assert [token.text for token in part.tokens] == ["w10"]


def test_tokens_are_told_with_the_text_that_they_stand_in() -> None:
    one = asked(9, stop=["2w13"], streams=True)
    feed(one, 11, 12, 14, 12, 13)
    assert "".join(part.text for part in one.parts) == "w11w12w14w1"
    told = [[(token.text, token.begins_at) for token in part.tokens] for part in one.parts]
    assert told == [[("w11", 0)], [("w12", 3)], [("w14", 6)], [("w12", 9)], []]
    assert [part.finish_reason for part in one.parts] == [None] * 4 + ["stop"]
    assert one.parts[0].tokens[0].likeliest == [("w11", -0.5), ("w9", -1.0)]


def test_a_stop_string_that_ends_with_the_last_token_is_a_stop() -> None:
    one = asked(2, stop=["w11"])
    feed(one, 10, 11)
    assert (one.parts[0].text, one.parts[0].finish_reason) == ("w10", "stop")


def test_a_row_of_which_nothing_can_be_chosen_fails() -> None:
    one = asked(5)
    one.row.accept(None)
    one.row.fail("twice")
    (part,) = one.parts
    assert part.is_last and "not finite" in (part.failure or "") and part.status == 500 and one.row.is_done


def label_row(tells_all: bool, parts: list[Part]) -> LabelRow:
    request = Request(0, [5, 6], "task3", 9, "", ([10, 11], [12]), 1)
    return LabelRow(request, prompts_of(RAGGED), parts.append, labels=["good", "bad"], tells_all=tells_all)


def test_a_label_comes_with_the_probabilities_of_all() -> None:
    parts: list[Part] = []
    row = label_row(True, parts)
    row.answer([0.75, 0.25])
    (part,) = parts
    assert (part.text, part.finish_reason, row.completion_tokens) == ("good", "stop", 2)
    (token,) = part.tokens
    assert token.likeliest == [("good", math.log(0.75)), ("bad", math.log(0.25))] and token.logprob == math.log(0.75)
    label_row(False, parts).answer([0.0, 1.0])
    assert parts[-1] == Part("bad", [], "stop")
    label_row(True, parts).answer([0.0, 1.0])
    assert math.isfinite(parts[-1].tokens[0].likeliest[1][1])  # JSON has no infinity
    label_row(True, parts).answer([math.nan, math.nan])
    assert parts[-1].status == 500


def test_the_tokenizer_of_these_tests_writes_a_token_as_its_word() -> None:
    assert words().decode([5, 6]) == "w5w6"
