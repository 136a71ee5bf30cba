"""The prompts in a checkpoint of Lightning: what stands beside their values, and how they are read without a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt import __version__
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.folder import INDEX_NAME, Entry, Saved
from lightning_softprompt.prompts.task_names import KEY, check_task_name, task_of_parameter
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

ENTRY = "soft_prompts"  # of the checkpoint, and the name of the prompts as a submodule of their model
FORMAT_VERSION = 1


def entry_of(prompts: SoftPrompts) -> dict[str, Any]:
    """What a checkpoint holds of the prompts under `ENTRY`, beside their values, which stand in its state dict.

    It consists of texts, numbers, lists and dicts, so that a checkpoint loads with `weights_only=True`.
    """
    base = prompts.base
    return {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "hidden_size": prompts.hidden_size,
        "base_model": None
        if base is None
        else {**asdict(base), "ids": list(base.ids), "fingerprint": list(base.fingerprint)},
        "tasks": [
            {"task": task, "start": prompts.starts[task], "frozen": not prompts[task].requires_grad} for task in prompts
        ],
        "templates": {task: asdict(template) for task, template in prompts.templates.items() if task in prompts},
    }


def read_checkpoint(source: str | Path | Mapping[str, Any]) -> tuple[Saved, dict[str, TaskTemplate]]:
    """The prompts of a checkpoint and their templates, checked completely.

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
        return Saved(next(iter(values.values())).shape[1], None, entries, values), {}
    try:
        return _described(content[ENTRY], values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SoftPromptError(
            f"{where}: what it says of its soft prompts is damaged or does not fit them ({error}); take another "
            "checkpoint of the run"
        ) from error


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
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SoftPromptError(
            f"{path} is damaged or no checkpoint ({said:.200}); copy it again, or take another checkpoint of the run"
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


def _described(entry: Mapping[str, Any], values: dict[str, Tensor]) -> tuple[Saved, dict[str, TaskTemplate]]:
    """The prompts with what the checkpoint says of them. Errors of any type mean that it does not fit."""
    if entry["format_version"] != FORMAT_VERSION:
        raise SoftPromptError(
            f"format version {entry['format_version']!r} of lightning-softprompt {entry.get('library_version')}, this "
            f"library reads {FORMAT_VERSION}; upgrade it"
        )
    entries = [
        Entry(task["task"], len(values[task["task"]]), str(task["start"]), bool(task["frozen"]))
        for task in entry["tasks"]
    ]
    if {each.task for each in entries} != set(values) or len(entries) != len(values):
        raise SoftPromptError(f"it lists the tasks {[each.task for each in entries]}, and holds {list(values)}")
    width, base = entry["hidden_size"], entry["base_model"]
    if any(value.shape[1] != width for value in values.values()):
        raise SoftPromptError(f"its prompts should be {width} wide")
    if base is not None:
        base = BaseModel(str(base["name"]), base["hidden_size"], tuple(base["ids"]), tuple(base["fingerprint"]))
    templates = {task: TaskTemplate(**fields) for task, fields in entry["templates"].items()}
    check_templates(templates)
    return Saved(width, base, entries, values), templates
