"""A run of two processes: rank 0 has rows of alpha and beta, rank 1 of beta and gamma. Each writes how it ended."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_softprompt import CollapseGuard, PromptGradientClipping, PromptGradientNorm, SoftPromptCallback
from tests import modules
from tests.gradients.recorded_runs import Weighted
from tests.modules import TASKS


class RowsOfTheRank(Weighted):
    """Batches by rank; beta is spoiled on rank 1 alone, at the third step."""

    def train_dataloader(self) -> DataLoader:
        rows = modules.Rows(24, tasks=(0, 1) if self.global_rank == 0 else (1, 2))
        self.weights = {(2, "beta"): math.nan} if self.global_rank == 1 else {}
        return DataLoader(rows, batch_size=6, collate_fn=rows.collate)


def main(folder: Path) -> None:
    guard, clipping = CollapseGuard(), PromptGradientClipping(1e-2, method="percentile")
    monitor, module = PromptGradientNorm(every_n_steps=1), RowsOfTheRank()
    callbacks = [SoftPromptCallback(dict(TASKS)), guard, clipping, monitor]
    options = {"strategy": "ddp_find_unused_parameters_true", "devices": 2, "use_distributed_sampler": False}
    modules.trainer(folder, *callbacks, End(folder, guard, clipping, monitor), **options).fit(module)


class End(Callback):
    def __init__(self, folder: Path, guard: CollapseGuard, clipping: PromptGradientClipping, monitor) -> None:
        self.folder, self.guard, self.clipping, self.monitor = folder, guard, clipping, monitor

    def on_train_end(self, trainer, pl_module) -> None:
        found = {
            "events": [(event.step, event.task, event.seen, event.action) for event in self.guard.events],
            "losses": {task: of["first_losses"] for task, of in self.guard.state_dict()["health"].items()},
            "limits": self.clipping.state_dict()["limits"],
            "prompts": {task: pl_module.model.soft_prompts[task].detach() for task in TASKS},
            "norms": {task: self.monitor.history[f"grad_norm/{task}"][:2] for task in TASKS},
            "clipped": {
                task: [norm for _, norm in self.monitor.history[f"grad_norm_clipped/{task}"]] for task in TASKS
            },
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
