"""Loaders of the user's own in a run that goes on in mid-epoch: exact where their order is, and told where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_softprompt import SoftPromptCallback
from tests.modules import Plain, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, int, list]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))


class Keeping(DataLoader):
    """A loader that knows where it is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.at = self.start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        self.at = start
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.at += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


class Scheduled(Plain):
    """Asks for the number of steps, for which Lightning makes the loaders before it restores their states."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Stream(IterableDataset):
    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Own:
    """No DataLoader, but an iterable of batches."""

    def __init__(self, rows: list) -> None:
        self.loader = DataLoader(rows, batch_size=3)

    def __iter__(self):
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def rows(count: int = 24) -> list[dict[str, Any]]:
    ids = torch.randint(4, 60, (count, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each, "labels": each, "attention_mask": torch.ones_like(each), "tasks": "a"} for each in ids]


def run(
    folder: Path, loader: DataLoader, resume: str | None = None, make: type[Plain] = Plain
) -> tuple[torch.Tensor, list]:
    seen, prompts = Seen(), SoftPromptCallback({"a": 3})
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(folder, prompts, saving, seen, **options).fit(make(), loader, ckpt_path=resume)
    return prompts.prompts["a"].detach().clone(), seen.batches


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("in order", Plain),
        ("with a state", Plain),
        ("stream", Plain),
        ("own", Plain),
        ("in order", Scheduled),
        ("with a state", Scheduled),
    ],
)
@pytest.mark.parametrize("step", [5, 10])
def test_a_loader_of_one_order_goes_on_with_the_next_batch(kind: str, make, step: int, tmp_path, caplog) -> None:
    def loader() -> Any:
        if kind == "own":
            return Own(rows())
        data = Stream(rows()) if kind == "stream" else rows()
        return (Keeping if kind == "with a state" else DataLoader)(data, batch_size=3)

    expected, whole = run(tmp_path / "whole", loader(), make=make)
    with caplog.at_level("INFO"):
        found, resumed = run(tmp_path / "again", loader(), str(tmp_path / "whole" / f"step={step}.ckpt"), make)
    assert torch.equal(found, expected) and resumed == whole[step:]
    (line,) = [record.getMessage() for record in caplog.records if "resumed from" in record.getMessage()]
    assert f"in the middle of epoch {step // 8}, behind batch {step % 8}: prompts, optimizer and schedule" in line
    how = "by the loader's own state" if kind == "with a state" else f"as {step % 8} batches were skipped"
    assert f"rows go on where they stopped, {how}" in line and "dropout, are drawn anew" in line
    assert ("which is exact if the loader gives the same rows" in line) == (kind in ("stream", "own"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_order_that_depends_on_the_epoch_is_that_of_the_epoch(workers: int, tmp_path) -> None:
    def loader() -> DataLoader:  # as Lightning makes one of shuffle=True, where several processes train
        sampler = DistributedSampler(rows(), num_replicas=1, rank=0, shuffle=True)
        return DataLoader(rows(), batch_size=3, sampler=sampler, num_workers=workers)

    expected, whole = run(tmp_path / "whole", loader())
    found, resumed = run(tmp_path / "again", loader(), str(tmp_path / "whole" / "step=10.ckpt"))
    assert resumed == whole[10:] and torch.equal(found, expected)


def test_a_loader_whose_order_is_drawn_anew_is_told(tmp_path, caplog) -> None:
    run(tmp_path / "whole", DataLoader(rows(), batch_size=3, shuffle=True))
    with caplog.at_level("INFO"):
        again = str(tmp_path / "whole" / "step=5.ckpt")
        _, resumed = run(tmp_path / "again", DataLoader(rows(), batch_size=3, shuffle=True), again)
    (line,) = [record.getMessage() for record in caplog.records if "resumed from" in record.getMessage()]
    assert "the order of the rows is drawn anew, so that some of this epoch come twice" in line
    assert [place[:2] for place in resumed[:4]] == [(0, 5), (0, 6), (0, 7), (1, 0)]


@pytest.mark.parametrize("batches", [2, 3])
def test_gradients_that_no_step_had_taken_are_told(batches: int, tmp_path, caplog) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx + 1 == batches:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    for resume in (None, str(tmp_path / "run.ckpt")):
        with caplog.at_level("INFO"):
            callbacks = [SoftPromptCallback({"a": 3})] + ([] if resume else [Saves()])
            loader = DataLoader(rows(), batch_size=3)
            trainer(tmp_path, *callbacks, accumulate_grad_batches=2).fit(Plain(), loader, ckpt_path=resume)
    (line,) = [record.getMessage() for record in caplog.records if "resumed from" in record.getMessage()]
    lost = "the last 1 batches, which no step had taken yet, are lost; rows go on where they stopped"
    assert (lost in line) == (batches == 3)


def test_nothing_is_said_where_a_run_begins_or_an_epoch_does(tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path / "whole", DataLoader(rows(15), batch_size=3))
        run(tmp_path / "again", DataLoader(rows(15), batch_size=3), str(tmp_path / "whole" / "step=5.ckpt"))
    assert not [record for record in caplog.records if "resumed from" in record.getMessage()]
