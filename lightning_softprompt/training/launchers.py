"""Which ways of starting processes leave the trained prompts to the process that called `fit`."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_softprompt.errors import SoftPromptError


def check_launcher(trainer: Trainer) -> None:
    """Raise a `SoftPromptError` if the Trainer would train in processes from which no prompt comes back.

    With ddp_spawn, ddp_fork, ddp_notebook and their like, Lightning 2.6 trains in copies of the calling process and
    calls no hook in that process itself. It brings back only the values of parameters that the caller's module has, and
    the prompts are parameters of the copies alone.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise SoftPromptError(
            f"{type(trainer.strategy).__name__} with start method {launcher._start_method!r} (strategy='ddp_"
            f"{launcher._start_method}' and its like) trains in copies of this process, and what they train does not "
            "come back to it; use strategy='ddp' in a script, or devices=1 in a notebook"
        )
