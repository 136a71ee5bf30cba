"""How near a student is to its teacher, against the bare model on hard tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from lightning_softprompt.base.tokens import encode_target
from lightning_softprompt.training.fidelity import measure_fidelity
from tests import tiny
from tests.training.distilled import STARTS, TEACHERS, by_hand
from tests.training.test_lessons import lessons_of, rows_of

WORDS = ("a", "the", "it", "so", "film", "good", "news", "text", "tweet", "bad", "is")


def test_a_student_that_is_its_teacher_is_as_it_is(tiny_base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    lessons = lessons_of(tokenizer)
    prompts = lessons._model.soft_prompts
    prompts.remove("free")
    prompts.add("free", prompts["free (teacher)"].detach())
    found = measure_fidelity(lessons._model, lessons, "free", rows_of(tokenizer, "free", *WORDS))
    assert found.divergence < 1e-6 and found.equal_first == found.equal_answers == 100
    assert found.tokens_before == found.tokens_after == len(encode_target(tokenizer, TEACHERS["free"]))


def test_every_figure_is_that_of_the_rows_alone(tiny_base) -> None:
    tokenizer, bare = AutoTokenizer.from_pretrained(tiny_base), tiny.tiny_model().double()
    lessons = lessons_of(tokenizer)
    rows = rows_of(tokenizer, "tone", *[f"{one} {other}" for one in WORDS for other in WORDS])
    teacher, student = encode_target(tokenizer, TEACHERS["tone"]), STARTS["tone"]
    embed, labels = bare.get_input_embeddings(), [encode_target(tokenizer, label)[0] for label in ("good", "bad")]
    divergences, without, firsts, answers = [], [], [], []
    for row in rows:
        both = [tiny.hard_row(bare, tiny.Row(0, hard, row.text_ids))[-1] for hard in (teacher, student)]
        firsts.append(int(both[0].argmax()) == int(both[1].argmax()))
        chosen = [max(labels, key=lambda token: float(logits[token])) for logits in both]
        answers.append(chosen[0] == chosen[1])
        hard = [embed(torch.tensor(ids)).detach() for ids in (teacher, student)]
        divergences.append(float(by_hand(bare, *hard, row.text_ids, row.text_ids, chosen[:1]).detach()))
        alone = bare(torch.tensor([row.text_ids])).logits[0, -1].log_softmax(-1)
        taught = both[0].log_softmax(-1)
        without.append(float((taught.exp() * (taught - alone)).sum().detach()))
    found = measure_fidelity(lessons._model, lessons, "tone", rows)
    assert found.divergence_without == pytest.approx(sum(without) / len(rows), rel=1e-5)
    assert found.text == tokenizer.decode(rows[0].text_ids) and {found.answer_before, found.answer_after} <= {
        "good",
        "bad",
    }
    assert found.divergence == pytest.approx(sum(divergences) / len(rows), rel=1e-5)
    assert found.equal_first == pytest.approx(100 * sum(firsts) / len(rows))
    assert found.equal_answers == pytest.approx(100 * sum(answers) / len(rows)) and 0 < sum(answers) < len(rows)
    assert (found.task, found.rows, found.tokens_before, found.tokens_after) == ("tone", 121, len(teacher), 3)


def test_the_first_token_of_a_longer_answer_is_its_first(tiny_base) -> None:
    tokenizer, bare = AutoTokenizer.from_pretrained(tiny_base), tiny.tiny_model().double()
    lessons = lessons_of(tokenizer)
    prompts, teacher = lessons._model.soft_prompts, encode_target(tokenizer, TEACHERS["free"])
    prompts.remove("free")
    prompts.add("free", prompts["free (teacher)"].detach()[4:])
    rows = rows_of(tokenizer, "free", *[f"{one} {other}" for one in WORDS[:5] for other in WORDS])
    first, answers = [], []
    for row in rows:
        both = [tiny.hard_greedy(bare, tiny.Row(0, hard, row.text_ids), 6)[0] for hard in (teacher, teacher[4:])]
        ends = [ids.index(2) + 1 if 2 in ids else 6 for ids in both]
        first.append(both[0][0] == both[1][0])
        answers.append(both[0][: ends[0]] == both[1][: ends[1]])
    found = measure_fidelity(lessons._model, lessons, "free", rows)
    assert found.equal_first == pytest.approx(100 * sum(first) / len(rows)) and 0 < sum(first) < len(rows)
    assert found.equal_answers == pytest.approx(100 * sum(answers) / len(rows)) and 0 < sum(answers) < sum(first)


def test_what_is_timed_is_a_request_with_the_hard_prompt_and_one_with_the_soft(tiny_base, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    lessons = lessons_of(tokenizer)
    model, calls = lessons._model, []
    rows = rows_of(tokenizer, "free", *WORDS)
    counts = [len(answer) for answer in lessons.answers(rows)]
    generate = model.generate

    def noting(**given):
        calls.append((given["input_ids"].tolist(), given["tasks"], given["max_new_tokens"]))
        return generate(**given)

    monkeypatch.setattr(model, "generate", noting)
    found = measure_fidelity(model, lessons, "free", rows)
    hard = encode_target(tokenizer, TEACHERS["free"])
    timed = calls[-10:]
    for row, count, before, after in zip(rows, counts, timed[::2], timed[1::2], strict=False):
        assert before == ([[*hard, *row.text_ids]], [None], count) and after == ([row.text_ids], ["free"], count)
    assert found.seconds_before > 0 and found.seconds_after > 0
