"""What two ranks do, each a process: `torchrun --nproc_per_node 2 -m tests.integration.two_ranks FOLDER BASE`.

Alpha has rows on rank 0 alone, beta on both, gamma on rank 1 alone, delta on neither.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics.aggregation import CatMetric, MeanMetric
from torchmetrics.classification import BinaryAUROC
from torchmetrics.text import BLEUScore

from lightning_softprompt import PerTask, SoftPromptCallback, cli
from tests import modules, tiny
from tests.cli.command_line import overrides

TASKS = {"alpha": 4, "beta": 7, "gamma": 2, "delta": 3}
STEPS, ROWS = 6, 6


def batches(rank: int | None) -> list[dict[str, Any]]:
    """Of a rank, or of both together. In the fourth step only beta has rows."""
    draw, made = torch.Generator().manual_seed(5), []
    for step in range(STEPS):
        rows = []
        for of_rank in range(2):
            mine = (0, 1) if of_rank == 0 else (1, 2)
            for row in range(ROWS):
                ids = torch.randint(
                    2, tiny.VOCABULARY, (int(torch.randint(3, 8, (1,), generator=draw)),), generator=draw
                )
                task = 1 if step == 3 else mine[row % 2]
                if rank is None or rank == of_rank:
                    rows.append((ids, task))
        made.append(modules.Rows(0).collate(rows))
    return made


class MeanOfRows(modules.Plain):
    """The loss is the mean of the rows' own, so that the mean over ranks is that over all rows."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.01)
        self.losses, self.all_losses = PerTask(MeanMetric()), PerTask(CatMetric(), list(TASKS))
        self.areas = PerTask(BinaryAUROC(), list(TASKS))  # keeps lists, of floats and of integers
        self.words = PerTask(BLEUScore(n_gram=1))  # of texts
        self.seen: list[dict[str, Any]] = []

    def row_losses(self, batch: dict[str, Any]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.row_losses(batch).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses, tasks = self.row_losses(batch), [list(TASKS)[task] for task in batch["task_ids"]]
        self.losses.update(tasks, losses)
        self.all_losses.update(tasks, losses)
        self.areas.update(tasks, losses.sigmoid(), batch["input_ids"][:, 0] % 2)
        texts = [" ".join(map(str, ids)) for ids in (batch["input_ids"] % 7).tolist()]
        self.words.update(tasks, texts, [["1 2 3 4 5"]] * len(texts))

    def on_validation_epoch_end(self) -> None:
        scalars = {
            **self.losses.scalars("val/loss"),
            **self.areas.scalars("val/area"),
            **self.words.scalars("val/words"),
        }
        self.seen.append({"scalars": scalars, "each": self.all_losses.compute()})
        for metric in (self.losses, self.all_losses, self.areas, self.words):
            metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Not Adam, which divides rounding by rounding where a gradient is near zero.
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=0.1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[float]:
        return self.row_losses(batch).tolist()


class Sharded(MeanOfRows):
    """The base is sharded over the ranks by FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            model, mesh = tiny.tiny_model("llama").requires_grad_(False), self.device_mesh["data_parallel"]
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            self.model = fully_shard(model, mesh=mesh)


def loaders(rank: int | None) -> tuple[DataLoader, DataLoader]:
    made = batches(rank)
    return DataLoader(made, batch_size=None), DataLoader(made[:2], batch_size=None)  # type: ignore[arg-type]


def fit(
    folder: Path,
    rank: int | None,
    prefix: str,
    *callbacks: Callback,
    resume: Path | None = None,
    make: type[MeanOfRows] = MeanOfRows,
    **options: Any,
) -> MeanOfRows:
    """A run of two epochs; options of the Trainer are those of the ranks, or none."""
    module, callback = make(), SoftPromptCallback(dict(TASKS), prefix=prefix)
    defaults = dict(max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=any(callbacks))
    run = modules.trainer(folder, callback, *callbacks, **{**defaults, **options})
    train, validation = loaders(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, train, validation, ckpt_path=resume)
    return module


def prompts_of(module: MeanOfRows) -> dict[str, Tensor]:
    return {task: module.model.soft_prompts[task].detach().clone() for task in TASKS}


def run_commands(base: Path, folder: Path) -> None:
    """The example's config on both ranks: fit, then predict."""
    ranks = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    for command in ("fit", "predict"):
        cli.main([command, "--config=examples/mixed_tasks.yaml", *overrides(base, folder), *ranks])


def main(folder: Path, base: Path) -> None:
    ddp = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    module = fit(folder, rank, "auto", saving, **ddp)
    found["auto"], found["seen"] = prompts_of(module), module.seen
    found["never"] = prompts_of(fit(folder, rank, "never", **ddp))
    found["accumulated"] = prompts_of(fit(folder, rank, "auto", accumulate_grad_batches=2, **ddp))
    found["resumed"] = prompts_of(fit(folder, rank, "auto", resume=folder / "epoch=0.ckpt", **ddp))
    fsdp = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), "make": Sharded}
    saving = ModelCheckpoint(dirpath=folder, filename="{epoch}-sharded", save_top_k=-1)
    module = fit(folder, rank, "auto", saving, **{**ddp, **fsdp})
    assert isinstance(module.model.model.layers[0].mlp.up_proj.weight, DTensor)
    found["sharded"], found["seen sharded"] = prompts_of(module), module.seen
    fsdp = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), "make": Sharded}
    found["resumed sharded"] = prompts_of(
        fit(folder, rank, "auto", resume=folder / "epoch=0-sharded.ckpt", **{**ddp, **fsdp})
    )
    losses = PerTask(MeanMetric())
    losses.update(["alpha", "beta"], torch.tensor([1.0, 2.0]))
    losses.compute()
    losses.update(["beta"] * rank, torch.tensor([5.0] * rank))  # rank 1 alone
    found["twice"] = losses.scalars("loss")
    torch.save(found, folder / f"{rank}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_commands(base, folder / "commands")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    # Torch 2.13 may abort a rank that ends while its threads still talk to the other.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
