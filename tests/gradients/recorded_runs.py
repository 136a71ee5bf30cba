"""Short runs whose losses can be spoiled by step and task, and a record of what each step did."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

from lightning_softprompt import SoftPromptCallback
from tests import modules
from tests.modules import TASKS, loader, trainer

NAMES = list(TASKS)


class Weighted(modules.Plain):
    """Each row's loss times a weight of its step and task, or of its task alone: not a number, or a thousand.

    It logs the loss of each task, as `CausalLMModule` does.
    """

    def __init__(
        self,
        weights: dict[tuple[int, str], float] | None = None,
        always: dict[str, float] | None = None,
        optimizer: type = torch.optim.AdamW,
    ) -> None:
        super().__init__(learning_rate=0.01)
        self.weights = weights or {}
        self.always = always or {}
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
        ).mean(1)
        tasks = [NAMES[task] for task in batch["task_ids"].tolist()]
        weights = [self.weights.get((self.global_step, task), 1.0) * self.always.get(task, 1.0) for task in tasks]
        losses = losses * torch.tensor(weights)
        for task in set(tasks):
            self.log(f"train/loss/{task}", losses[[task == other for other in tasks]].mean().detach())
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.learning_rate)


class Silent(Weighted):
    """Logs nothing: all that is known is the loss of the batch."""

    def log(self, *arguments: Any, **options: Any) -> None:
        pass


class Recorder(Callback):
    """Prompts, gradients and moments around every step, taken at hooks that no stage uses."""

    def __init__(self) -> None:
        self.start: list[dict[str, Tensor]] = []
        self.end: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Any]] = []

    def prompts(self, pl_module) -> dict[str, nn.Parameter]:
        return {task: pl_module.model.soft_prompts[task] for task in TASKS}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.start.append(modules.snapshot(self.prompts(pl_module)))

    def on_after_backward(self, trainer, pl_module) -> None:
        self.gradients.append(self._gradients(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.end.append(modules.snapshot(self.prompts(pl_module)))
        self.clipped.append(self._gradients(pl_module))
        state = trainer.optimizers[0].state
        self.moments.append({task: copy.deepcopy(state.get(p, {})) for task, p in self.prompts(pl_module).items()})

    def _gradients(self, pl_module) -> dict[str, Tensor]:
        return {task: p.grad.clone() for task, p in self.prompts(pl_module).items() if p.grad is not None}


def run(folder, module, *callbacks, count: int = 24, batch_size: int = 6, **options) -> Recorder:
    torch.manual_seed(0)
    recorder = Recorder()
    prompts = SoftPromptCallback(dict(TASKS))
    trainer(folder, prompts, *callbacks, recorder, **options).fit(module, loader(count, batch_size))
    return recorder


def norm_of(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
