"""Label ranking, as a function and as `MixedTaskGenerator.rank`, against one bare forward pass a label."""

from __future__ import annotations

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lightning_softprompt import MixedTaskGenerator, SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.inference.ranking import RankedRow, among_labels, classify_labels, rank_labels, stems
from tests import tiny
from tests.tokenizer import word_tokenizer

LABELS = [[[5], [6]], [[7, 8, 9], [7, 8], [7], [10, 11]], [[12, 13], [12, 14], [15]]]


@pytest.mark.parametrize("attached", [False, True])
def test_scores_are_those_of_each_label_alone(attached: bool) -> None:
    bare, model = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    texts = [[20, 21, 22], [30], [40, 41]]
    if attached:
        attach(model, SoftPrompts.for_model(model, {name: Tokens(ids) for name, ids in tiny.HARD.items()}))
    tasks = [*tiny.TASKS[:2], None] if attached else [None] * 3
    rows = [RankedRow(text, task, labels) for text, task, labels in zip(texts, tasks, LABELS, strict=True)]
    found = rank_labels(model, rows, pad_token_id=1)
    for row, scores in zip(rows, found, strict=True):
        prompt = tiny.HARD[row.task] if row.task else []
        for label, score in zip(row.labels, scores, strict=True):
            ids = [*prompt, *row.text_ids, *label]
            with torch.no_grad():
                log_probabilities = bare(torch.tensor([ids])).logits[0].log_softmax(-1)
            begin = len(ids) - len(label)
            expected = sum(float(log_probabilities[begin + k - 1, token]) for k, token in enumerate(label))
            assert score == pytest.approx(expected, rel=1e-4)


def test_labels_of_one_token_share_one_row() -> None:
    model, widths = tiny.tiny_model("llama"), []
    model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape), with_kwargs=True)
    rank_labels(model, [RankedRow([20, 21], None, [[5], [6], [7]]), RankedRow([9], None, [[5], [6]])], 1)
    assert widths == [(2, 2)]


WORDS = word_tokenizer([f"w{index}" for index in range(4, tiny.VOCABULARY)])
Ask = tuple[list[int], "str | None", list[list[int]]]


def ranker(kind: str = "llama") -> MixedTaskGenerator:
    model = tiny.tiny_model(kind)
    prompts = SoftPrompts.for_model(model, {name: Tokens(ids) for name, ids in tiny.HARD.items()})
    return MixedTaskGenerator(attach(model, prompts), WORDS)


def asked(count: int, seed: int = 0) -> list[Ask]:
    """Texts of all tasks and of none, each with some labels of one to three tokens, which may begin one another."""
    draw = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(4, tiny.VOCABULARY) for _ in range(draw.randint(1, longest))]

    made: list[Ask] = []
    for _ in range(count):
        labels = [ids(3) for _ in range(draw.randint(1, 4))]
        made.append((ids(12), draw.choice([*tiny.HARD, None]), [*labels, [*labels[0], 9]]))
    return made


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def ranked_alone(bare, ask: Ask) -> list[float]:
    """The bare model's log-probabilities, with hard tokens, one pass a label."""
    text, task, labels = ask
    scores = []
    for label in labels:
        logits = tiny.hard_row(bare, tiny.Row(0, tiny.HARD[task] if task else [], [*text, *label]))
        predicted = logits.double().log_softmax(-1)[len(text) - 1 : -1]
        scores.append(float(predicted.gather(1, torch.tensor([label]).T).sum()))
    return scores


def assert_ranked(bare, found, asks: list[Ask]) -> None:
    assert len(found) == len(asks)
    for scores, ask in zip(found, asks, strict=True):
        assert tiny.relative_error(torch.tensor(scores), torch.tensor(ranked_alone(bare, ask))) < 1e-5, ask


def split(asks: list[Ask], as_text: bool = False) -> dict[str, Any]:
    put = words if as_text else list
    return {
        "texts": [put(text) for text, _, _ in asks],
        "tasks": [task for _, task, _ in asks],
        "labels": [[put(label) for label in labels] for _, _, labels in asks],
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_every_text_of_a_mixed_call_is_ranked_as_it_is_alone(kind: str, budget: int) -> None:
    asks = asked(30)
    found = ranker(kind).rank(**split(asks), max_batch_tokens=budget)
    assert_ranked(tiny.tiny_model(kind), found, asks)
    assert found.failures == {} and all(isinstance(score, float) for scores in found for score in scores or [])


def test_texts_and_labels_may_be_words() -> None:
    asks = asked(10)
    assert ranker().rank(**split(asks, as_text=True)) == ranker().rank(**split(asks))


def test_a_bad_row_among_good_ones_stops_none_of_them(caplog) -> None:
    asks: list[Any] = asked(8)
    asks[2] = ([5, 6], "tone", [[7]])
    asks[3] = ([5, 6], "one", [[7], []])
    asks[5] = ([5, tiny.VOCABULARY], None, [[7]])
    asks[6] = ([5] * 120, "long", [[7, 8]])
    generator = ranker()
    found = generator.rank(**split(asks))
    assert [index for index, scores in enumerate(found) if scores is None] == [2, 3, 5, 6] == list(found.failures)
    assert "unknown task 'tone'" in found.failures[2] and "labels[1] has no tokens" in found.failures[3]
    assert generator.failures == found.failures and "4 of 8 requests have no answer" in caplog.text
    good = [index for index in range(8) if index not in found.failures]
    assert_ranked(tiny.tiny_model(), [found[index] for index in good], [asks[index] for index in good])


def test_a_batch_without_memory_is_halved() -> None:
    asks, generator, refused = asked(20), ranker(), []

    def short_of_memory(model, args, kwargs) -> None:
        if kwargs["input_ids"].numel() > 80:
            refused.append(kwargs["input_ids"].shape)
            raise torch.OutOfMemoryError("CUDA out of memory")

    generator.model.register_forward_pre_hook(short_of_memory, with_kwargs=True, prepend=True)
    found = generator.rank(**split(asks))
    assert refused and found.failures == {}
    assert_ranked(tiny.tiny_model(), found, asks)


def test_two_threads_rank_with_one_generator() -> None:
    generator, turns = ranker(), threading.Barrier(2)

    def ask(seed: int) -> tuple[list[Ask], Any, dict[int, str]]:
        asks: list[Any] = asked(12, seed)
        asks[seed] = ([], None, [[5]])
        turns.wait(20)
        found = generator.rank(**split(asks), max_batch_tokens=60)
        turns.wait(20)  # now both have ranked
        return asks, found, generator.failures

    with ThreadPoolExecutor(2) as pool:
        for seed, (asks, found, failures) in zip((1, 2), pool.map(ask, (1, 2)), strict=True):
            assert list(failures) == [seed] == list(found.failures)
            del asks[seed], found[seed]
            assert_ranked(tiny.tiny_model(), found, asks)


def test_progress_and_mistakes_of_the_call(capsys) -> None:
    generator, asks = ranker(), split(asked(9))
    generator.rank(**asks, show_progress=True)
    printed = capsys.readouterr()
    assert "ranking" in printed.err and "9/9" in printed.err and printed.out == ""
    generator.rank(**asks)
    assert "ranking" not in "".join(capsys.readouterr())
    for changed in ({"tasks": ["one"]}, {"labels": [[[5]]] * 8}, {"texts": "w5 w6 w7 "}):
        with pytest.raises(SoftPromptError, match="one task and one list of labels a text"):
            generator.rank(**{**asks, **changed})
    with pytest.raises(SoftPromptError, match="max_batch_tokens must be at least 1, got 0"):
        generator.rank(**asks, max_batch_tokens=0)
    assert generator.rank([], [], []) == []


Label = list[int]


def shares_alone(bare, text: list[int], task: str | None, labels: list[Label]) -> list[float]:
    """The probabilities over the trie of the labels, a bare pass a node."""
    found = []
    for label in labels:
        share = 1.0
        for place, token in enumerate(label):
            children = sorted({other[place] for other in labels if other[:place] == label[:place]})
            row = tiny.Row(0, tiny.HARD[task] if task else [], text + label[:place])
            share *= float(tiny.hard_row(bare, row)[-1][children].softmax(0)[children.index(token)])
        found.append(share)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_probabilities_are_normalised_at_each_node_of_the_trie(kind: str) -> None:
    labels = [
        [[5], [6]],
        [[7, 8, 9], [7, 8, 10], [7, 11], [10, 11]],
        [[12, 2], [12, 13, 2], [15, 16, 17], [15, 16, 18]],
    ]
    texts = [[20, 21, 22], [30], [40, 41]]
    model = tiny.tiny_model(kind)
    attach(model, SoftPrompts.for_model(model, {name: Tokens(ids) for name, ids in tiny.HARD.items()}))
    tasks = [*tiny.TASKS[:2], None]
    rows = [RankedRow(text, task, each) for text, task, each in zip(texts, tasks, labels, strict=True)]
    bare = tiny.tiny_model(kind).double()
    for row, found in zip(rows, classify_labels(model, rows, pad_token_id=1), strict=True):
        right = shares_alone(bare, row.text_ids, row.task, [[*label] for label in row.labels])
        assert tiny.relative_error(*(torch.tensor(each, dtype=torch.float64) for each in (found, right))) < 1e-5
        assert sum(found) == pytest.approx(1, abs=1e-12)


def test_what_no_label_says_takes_nothing_from_any_label() -> None:
    # Behind [7] the model would write something else, and it is certain of it; [8] and [9] are all that is left there.
    labels, scores = (
        [[6], [7, 8], [7, 9]],
        [[math.log(0.1)], [math.log(0.3), -50.0], [math.log(0.3), -50.0 + math.log(3)]],
    )
    assert among_labels(labels, scores) == pytest.approx([0.25, 0.75 / 4, 0.75 * 3 / 4])
    assert among_labels([[5, 2], [5, 6, 2]], [[-1.0, math.log(0.2), -9.0][:2], [-1.0, math.log(0.8), -9.0]]) == (
        pytest.approx([0.2, 0.8])
    )
    assert among_labels([[5], [6]], [[-2000.0], [-2001.0]]) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_stems_are_those_that_no_other_one_begins_with() -> None:
    draw = random.Random(0)
    for _ in range(200):
        labels = [[draw.randrange(3) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 8))]
        all_stems = {tuple(label[:-1]) for label in labels}
        kept = [s for s in all_stems if not any(o != s and o[: len(s)] == s for o in all_stems)]
        assert stems(labels) == sorted(kept)
