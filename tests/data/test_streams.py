"""Rows that are read as they are needed: all of them come, in a drawn order that a resumed run goes on in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import datasets
import pytest
import torch

from lightning_softprompt import SoftPromptCallback, SoftPromptError, Source, TaskDataModule
from lightning_softprompt.data.mixing import TaskMixing
from lightning_softprompt.data.streams import RowStream, StreamMixing
from tests import modules
from tests.data.rows import TASKS_OF_ONE_COLUMN as TASKS

SIZES = (60, 30, 10)


def numbers(size: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"number": list(range(size))}).to_iterable_dataset()


def stream(stream_: int, size: int, num_rows: int | None = None, **options) -> RowStream:
    encode = options.pop("encode", lambda row: (stream_, row["number"]))
    return RowStream(numbers(size), num_rows or size, 0, f"stream {stream_}", encode, **options)


def streams() -> list[RowStream]:
    return [stream(index, size) for index, size in enumerate(SIZES)]


def epochs(mixing: StreamMixing, count: int, first: int = 0) -> list[list[tuple[int, int]]]:
    found = []
    for epoch in range(first, first + count):
        mixing.set_epoch(epoch)
        found.append(list(mixing))
    return found


def test_every_row_comes_once_an_epoch_in_the_order_of_seed_and_epoch() -> None:
    first, second, third = epochs(StreamMixing(streams(), seed=3), 3)
    everything = [(index, row) for index, size in enumerate(SIZES) for row in range(size)]
    assert sorted(first) == sorted(second) == sorted(third) == everything
    assert first != second and second != third
    assert [index for index, _ in first] != [index for index, _ in second]
    halves = Counter(index for seed in range(20) for index, _ in epochs(StreamMixing(streams(), seed), 1)[0][:50])
    assert all(abs(halves[index] / 20 - size / 2) < 1.5 for index, size in enumerate(SIZES))  # mixed evenly
    assert epochs(StreamMixing(streams(), seed=3), 1, first=2) == [third]  # read over, as a resumed run does
    assert epochs(StreamMixing(streams(), seed=4), 1) != [first]


def test_an_epoch_that_was_left_in_the_middle_changes_no_other_one() -> None:
    mixing = StreamMixing(streams(), 0)
    first, second = epochs(StreamMixing(streams(), 0), 2)
    for _, _ in zip(range(13), mixing, strict=False):
        pass
    assert epochs(mixing, 1, first=1) == [second] and epochs(mixing, 2) == [first, second]


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"size_limit": 20}, {"round_robin": True}], ids=str)
def test_shares_are_those_of_rows_that_are_known(options) -> None:
    tasks = [str(index) for index, size in enumerate(SIZES) for _ in range(size)]
    expected = list(TaskMixing(tasks, 0, **options).counts.values())
    rounds = epochs(StreamMixing(streams(), 0, **options), 6)
    for order in rounds:
        assert [Counter(index for index, _ in order)[index] for index in range(3)] == expected
    seen = Counter(row for order in rounds for row in order)
    for index, size in enumerate(SIZES):  # what comes often comes equally often, and nothing is left out for ever
        times = [seen[index, row] for row in range(size)]
        assert max(times) - min(times) <= 1
    if "round_robin" in options:
        assert [index for index, _ in rounds[0][:30]] == [0, 1, 2] * 10


def test_an_epoch_that_takes_a_part_goes_on_behind_it() -> None:
    rounds = epochs(StreamMixing([stream(0, 60, num_rows=25)], 0), 5)
    assert [len(order) for order in rounds] == [25] * 5
    rows = [row for order in rounds for _, row in order]
    assert sorted(rows[:60]) == sorted(rows[60:120]) == list(range(60)) and rows[:60] != rows[60:120]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_out(ranks: int) -> None:
    alone = epochs(StreamMixing(streams(), 0, temperature=2.0), 2)
    parts = [
        epochs(StreamMixing(streams(), 0, temperature=2.0, num_replicas=ranks, rank=rank), 2) for rank in range(ranks)
    ]
    for epoch, order in enumerate(alone):
        assert {len(part[epoch]) for part in parts} == {100 // ranks}
        together = [row for step in zip(*(part[epoch] for part in parts), strict=True) for row in step]
        assert together == order[: len(together)]


def test_rows_are_read_as_they_are_needed_and_once() -> None:
    read = []

    def rows() -> Iterator[dict[str, int]]:
        for number in range(30_000):
            read.append(number)
            yield {"number": number}

    data = datasets.IterableDataset.from_generator(rows)
    mixing = StreamMixing([RowStream(data, 8_000, 0, "rows", lambda row: row["number"])], 0)
    order = iter(mixing)
    next(order)
    assert 10_000 <= len(read) < 13_000
    rest = list(order)
    second, third = epochs(mixing, 2, first=1)
    assert len(read) == 30_000 and len({*rest, *second, *third}) == 23_999


def test_ranks_and_short_epochs_read_on_from_where_they_stand() -> None:
    """A loader asks for its own rows and no more, and `limit_train_batches` for fewer."""
    read = []

    def rows() -> Iterator[dict[str, int]]:
        for number in range(50):
            read.append(number)
            yield {"number": number}

    expected = epochs(StreamMixing([stream(0, 50)], 0), 3)
    data = datasets.IterableDataset.from_generator(rows)
    mixing = StreamMixing([RowStream(data, 50, 0, "rows", lambda row: (0, row["number"]))], 0, num_replicas=2, rank=0)
    for epoch, order in enumerate(expected):
        mixing.set_epoch(epoch)
        wanted = 25 if epoch else 10
        assert [row for _, row in zip(range(wanted), mixing, strict=False)] == order[: 2 * wanted : 2]
    assert len(read) <= 150


def test_rows_that_cannot_be_used_are_left_out_and_told(tokenizer, tmp_path, caplog) -> None:
    rows = [{"text": "a b", "tone": "good"}] * 20 + [{"text": "c", "tone": "worse"}, {"text": None, "tone": "bad"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(path), task="tone", streaming=True)
    lenient = TaskDataModule(tokenizer, TASKS, train=source, batch_size=4, strict=False)
    lenient.setup("fit")
    loader = lenient.train_dataloader()
    batches = list(loader)
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 6
    assert len(batches) == 6 and sum(len(batch["tasks"]) for batch in batches) == 22
    assert len(lenient.skipped["train"]) == 2 and any("' worse'" in reason for reason in lenient.skipped["train"])
    assert f"a row cannot be used, and is left out like others to come: {path}, line 2" in caplog.text
    lenient.teardown("fit")
    assert "2 rows of the train split cannot be used" in caplog.text
    strict = TaskDataModule(tokenizer, TASKS, train=source, batch_size=4)
    strict.setup("fit")
    with pytest.raises(SoftPromptError, match=r"rows\.jsonl, line 2[12]: the (target is ' worse'|template)"):
        list(strict.train_dataloader())
    path.write_text(json.dumps(rows[20]) + "\n")
    hopeless = TaskDataModule(tokenizer, TASKS, train=source, strict=False)
    hopeless.setup("fit")
    with pytest.raises(SoftPromptError, match=r"rows\.jsonl has no row that can be used"):
        list(hopeless.train_dataloader())


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_what_a_stream_cannot_do_is_refused(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "tone": "good"}\n' * 4)
    source = Source(str(path), task="tone", streaming=True)
    grouped = TaskDataModule(tokenizer, TASKS, train=source, group_by_length=True)
    grouped.setup("fit")
    with pytest.raises(SoftPromptError, match="group_by_length needs to know all rows"):
        grouped.train_dataloader()
    data = TaskDataModule(tokenizer, TASKS, train=source, validation=source, batch_size=2)
    run = modules.trainer(tmp_path, SoftPromptCallback({"tone": 3}), overfit_batches=2)
    with pytest.raises(SoftPromptError, match="overfit_batches needs; set streaming=False"):
        run.fit(modules.Plain(), datamodule=data)
    for options in ({"num_rows": 0, "streaming": True}, {"num_rows": 5}):
        with pytest.raises(SoftPromptError, match="num_rows must be at least 1 and belongs to streaming=True"):
            TaskDataModule(tokenizer, TASKS, train=Source(str(path), **options))
    path.write_text("")
    for num_rows in (None, 5):
        empty = Source(str(path), task="tone", streaming=True, num_rows=num_rows)
        with pytest.raises(SoftPromptError, match=r"rows\.jsonl is empty; the train split"):
            TaskDataModule(tokenizer, TASKS, train=empty).setup("fit")


def test_a_stream_that_breaks_off_says_which() -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"number": 1}
        raise OSError("connection lost")

    broken = RowStream(datasets.IterableDataset.from_generator(rows), 2, 0, "some/set", dict)
    with pytest.raises(SoftPromptError, match="some/set cannot be read: connection lost"):
        list(StreamMixing([broken], 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_resumed_bit_for_bit(tokenizer, tmp_path, workers: int) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    for task, size in (("tone", 16), ("free", 8)):
        rows = [{"text": "a b c d e"[: 1 + 2 * (number % 5)], "tone": "good"} for number in range(size)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder, resume=None):
        sources = [Source(str(tmp_path / f"{task}.jsonl"), task=task, streaming=True) for task in TASKS]
        data = TaskDataModule(tokenizer, TASKS, train=sources, batch_size=3, temperature=2.0, num_workers=workers)
        prompts = SoftPromptCallback(dict.fromkeys(TASKS, 3))
        saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = modules.trainer(folder, prompts, saving, **options)
        trainer.fit(modules.Plain(), datamodule=data, ckpt_path=resume)
        assert trainer.global_step == 16
        return {task: prompts.prompts[task].detach().clone() for task in TASKS}

    whole = tmp_path / "whole"
    expected = run(whole)
    for step in (4, 8, 12):
        found = run(tmp_path / f"{step}", whole / f"step={step}.ckpt")
        assert all(torch.equal(found[task], expected[task]) for task in TASKS)


def test_tasks_over_the_same_texts_have_these_in_orders_of_their_own(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": " ".join("abcde"[int(digit)] for digit in f"{row:03}"[:3] if digit < "5")} for row in range(30)]
    path.write_text("".join(json.dumps({**row, "tone": "good"}) + "\n" for row in rows if row["text"]))
    sources = [Source(str(path), task=task, streaming=True) for task in TASKS]
    data = TaskDataModule(tokenizer, TASKS, train=sources)
    data.setup("fit")
    one, other = (
        [row["row"]["text"] for row, _ in zip(each.rows_from(0), rows, strict=False)] for each in data.streams
    )
    assert sorted(one) == sorted(other) and one != other
