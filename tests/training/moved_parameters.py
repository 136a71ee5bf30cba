"""Which parameters of a module a run has moved, which are to be those of its prompts and of its head alone."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from tests import modules
from tests.modules import TASKS


class Start(Callback):
    """Keeps every parameter as it was when training started."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.values = modules.snapshot(dict(pl_module.named_parameters()))


def assert_exactly_the_prompts_moved(module: LightningModule, start: Start, tasks=tuple(TASKS)) -> None:
    for name, value in module.named_parameters():
        moved = not torch.equal(value, start.values[name])
        expected = name.startswith("head.") or any(name.endswith(f"soft_prompts.prompt:{task}") for task in tasks)
        assert moved == expected, name
    for name, value in modules.base_state().items():
        assert torch.equal(module.model.state_dict()[name], value), name
