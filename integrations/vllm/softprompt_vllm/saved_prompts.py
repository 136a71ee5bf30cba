"""A folder of saved prompts (`soft_prompts.json` and safetensors), as `SoftPrompts.save_pretrained` writes it.

A writer replaces the index last, so the index and the file that it names are of one save. The file is read into memory
and its hash is checked, so that the prompts that are served are whole, whatever happens to the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from softprompt_vllm.base_model import BaseModel
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.tasks import Task
from softprompt_vllm.templates import Template

INDEX_NAME = "soft_prompts.json"
_KEY = "prompt:"
_NAME = re.compile(r"[\w. -]+\.safetensors")
_ATTEMPTS = 20


@dataclass(frozen=True)
class SavedPrompts:
    """What a folder holds: the width of its prompts, their base model (None if it is not known), and its tasks."""

    hidden_size: int
    base: BaseModel | None
    tasks: dict[str, Task]


def read_saved_prompts(folder: Path, dtype: torch.dtype) -> SavedPrompts:
    """Read and check a folder of saved prompts, of format 1 or 2.

    Args:
        folder: the folder.
        dtype: the dtype to give the prompts.

    Raises:
        SoftPromptError: a file that is missing, damaged, of another format, or does not fit the other one; or a prompt
            that is not finite in `dtype`.
    """
    index, data = _read_whole(folder)
    path = folder / INDEX_NAME
    try:
        name, digest, hidden = _get(index, "tensors", str), _get(index, "sha256", str), _get(index, "hidden_size", int)
        if hashlib.sha256(data).hexdigest() != digest:
            raise SoftPromptError(f"{name} is not the file that the index was written with")
        tensors = load_tensors(data)
        tasks = [_task(entry, tensors, hidden, dtype) for entry in _get(index, "tasks", list)]
        base = _base(index.get("base_model"))
    except (SoftPromptError, SafetensorError, ValueError, OverflowError) as error:
        raise SoftPromptError(f"{path} cannot be served: {error}; copy the whole folder again") from error
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise SoftPromptError(f"{path} cannot be served: it has no task, or one twice; save it anew")
    return SavedPrompts(hidden, base, {task.name: task for task in tasks})


def _read_whole(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The index and the file that it names, of one save."""
    path = folder / INDEX_NAME
    for attempt in range(_ATTEMPTS):
        try:
            index = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise SoftPromptError(f"{path} cannot be read ({error}); give the folder of a save") from error
        version = index.get("format_version") if isinstance(index, dict) else None
        if version not in (1, 2):
            raise SoftPromptError(f"{path} has format version {version!r}, this plugin reads 1 and 2; upgrade it")
        name = index.get("tensors")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SoftPromptError(f"{path} names its tensors {name!r}, outside its folder or no file; save anew")
        try:
            return index, (folder / name).read_bytes()
        except FileNotFoundError:
            time.sleep(0.002 * attempt)  # a writer has put another save in place since the index was read
        except OSError as error:
            raise SoftPromptError(f"{folder / name} cannot be read ({error}); copy it again") from error
    raise SoftPromptError(f"{folder / name} is missing, though {INDEX_NAME} names it; copy the whole folder again")


def _task(entry: object, tensors: dict[str, Tensor], hidden: int, dtype: torch.dtype) -> Task:
    if not isinstance(entry, dict):
        raise SoftPromptError(f"a task must be an object, found {entry!r:.80}")
    name, length = _get(entry, "task", str), _get(entry, "length", int)
    tensor = tensors.get(_KEY + name)
    if not name.strip() or tensor is None:
        raise SoftPromptError(f"there is no prompt of the task {name!r}")
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (length, hidden) or length < 1:
        raise SoftPromptError(
            f"the prompt of {name!r} should be float32 [{length}, {hidden}], found {tensor.dtype} {list(tensor.shape)}"
        )
    rows = tensor.to(dtype)
    if not bool(torch.isfinite(rows).all()):
        raise SoftPromptError(f"the prompt of {name!r} is not finite in {dtype}; train it again")
    return Task(name, rows, _template(entry.get("template"), name))


def _template(found: Any, task: str) -> Template | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise SoftPromptError(f"the template of {task!r} must be an object, found {found!r:.80}")
    system = found.get("system")
    return Template(
        _get(found, "text", str),
        _get(found, "chat", bool),
        None if system is None else _get(found, "system", str),
        _get({"special_tokens": False, **found}, "special_tokens", bool),
    )


def _base(found: Any) -> BaseModel | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise SoftPromptError(f"base_model must be an object, found {found!r:.80}")
    ids, values = _get(found, "ids", list), _get(found, "fingerprint", list)
    has_ids = bool(ids) and all(type(each) is int and each >= 0 for each in ids)
    has_values = bool(values) and all(type(each) in (int, float) for each in values)
    if not has_ids or not has_values or len(values) % len(ids):
        raise SoftPromptError("base_model must have ids, and as many values of each in its fingerprint")
    return BaseModel(_get(found, "name", str), tuple(ids), tuple(map(float, values)))


def _get(found: dict[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    if type(value) is not kind:
        raise SoftPromptError(f"{name!r} must be of type {kind.__name__}, found {value!r:.80}")
    return value
