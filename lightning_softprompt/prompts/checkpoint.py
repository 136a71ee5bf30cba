"""The prompts in a checkpoint of Lightning: what stands beside their values, and how they are read without a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.folder import Saved
from lightning_softprompt.prompts.index import INDEX_NAME, Entry, read_description
from lightning_softprompt.prompts.task_names import KEY, check_task_name, task_of_parameter

ENTRY = "soft_prompts"  # of the checkpoint, and the name of the prompts as a submodule of their model


def read_checkpoint(source: str | Path | Mapping[str, Any]) -> Saved:
    """The prompts of a checkpoint, checked completely.

    Args:
        source: the path of the checkpoint, or its content where it is loaded already.

    Raises:
        SoftPromptError: a file that is missing, damaged or no checkpoint, a folder, or a checkpoint without prompts.
    """
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _load(Path(source))
    state_dict = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping):
        raise SoftPromptError(
            f"{where} is not a checkpoint of Lightning: it has no state dict; give a file that ModelCheckpoint or "
            "trainer.save_checkpoint wrote"
        )
    values = _values(state_dict, where)
    if not values:
        raise SoftPromptError(
            f"{where} holds no soft prompts; give the checkpoint of a run with SoftPromptCallback (its state dict has "
            f"{len(state_dict)} other values)"
        )
    if ENTRY not in content:  # written by 0.1
        entries = [Entry(task, len(value), "a checkpoint", False) for task, value in values.items()]
        return Saved(next(iter(values.values())).shape[1], None, entries, values)
    found = read_description(content[ENTRY], where)
    described = {entry.task: [entry.length, found.hidden_size] for entry in found.entries}
    shapes = {task: list(value.shape) for task, value in values.items()}
    if described != shapes:
        raise SoftPromptError(
            f"{where} describes prompts of shapes {described}, and holds {shapes}; take another checkpoint of the run"
        )
    return Saved(found.hidden_size, found.base, found.entries, values)


def _load(path: Path) -> Any:
    if (path / INDEX_NAME).is_file():
        raise SoftPromptError(f"{path} is a folder of saved prompts and no checkpoint; use SoftPrompts.from_pretrained")
    if path.is_dir():
        raise SoftPromptError(
            f"{path} is a folder, as of a checkpoint in shards; save with save_distributed_checkpoint=False, or make "
            f"one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise SoftPromptError(f"there is no checkpoint {path}; looked in {Path.cwd()}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises errors of many types for files that are not its own
        objects = _objects_in(path)
        if objects:
            raise SoftPromptError(
                f"{path} holds objects that could run code when they are loaded ({', '.join(objects)}); if you trust "
                "it, allow them first with torch.serialization.add_safe_globals"
            ) from error
        # PyTorch's own words advise to unpickle the file all the same.
        raise SoftPromptError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}); copy it again, or take another of the run"
        ) from error


def _objects_in(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of a file that is damaged this cannot be told
        return []


def _values(state_dict: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The prompts among the values of a state dict, by task, whatever the path of their model in the module."""
    values: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        owner, _, name = str(key).rpartition(".")
        if not name.startswith(KEY) or owner.rpartition(".")[2] != ENTRY:
            continue
        task = check_task_name(task_of_parameter(name))
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            raise SoftPromptError(
                f"{where}: the prompt of task {task!r} is damaged; take another checkpoint of the run"
            )
        if not bool(torch.isfinite(value).all()):
            raise SoftPromptError(
                f"{where}: the prompt of task {task!r} holds NaN or Inf; take an earlier checkpoint of the run"
            )
        if task in values and not torch.equal(values[task], value):
            raise SoftPromptError(
                f"{where} holds two prompts of task {task!r}, of two models; load the model you mean, and attach to it"
            )
        values[task] = value
    return values
