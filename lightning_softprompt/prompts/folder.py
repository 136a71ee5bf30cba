"""The files of saved prompts: one safetensors file and one JSON file, which a new save replaces together."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_softprompt import __version__
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import KEY, check_task_name

FORMAT_VERSION = 1
INDEX_NAME = "soft_prompts.json"


@dataclass(frozen=True)
class Entry:
    """One task of a saved folder: its name, its prompt's length, how the prompt started, and whether it is frozen."""

    task: str
    length: int
    start: str
    frozen: bool


@dataclass(frozen=True)
class Saved:
    """The content of a saved folder; `tensors` maps each task to its prompt, float32 `[length, hidden]`."""

    hidden_size: int
    base: BaseModel | None
    entries: list[Entry]
    tensors: dict[str, Tensor]


def save_folder(folder: Path, saved: Saved) -> None:
    """Write `saved` into `folder`.

    The tensors go into a file that is named after their hash. Then one rename puts the JSON file, which names the
    tensors' file, in place. If saving fails before that rename, the earlier save is still complete; after it, the
    earlier tensors are removed.

    Raises:
        SoftPromptError: a prompt that holds NaN or Inf; nothing is written then.
    """
    for task, tensor in saved.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SoftPromptError(f"the prompt of task {task!r} holds NaN or Inf and is not saved; train it again")
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({KEY + task: tensor for task, tensor in saved.tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"soft_prompts-{digest[:12]}.safetensors"
    index = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "tensors": name,
        "sha256": digest,
        "hidden_size": saved.hidden_size,
        "base_model": asdict(saved.base) if saved.base else None,
        "tasks": [asdict(entry) for entry in saved.entries],
    }
    write_atomically(folder / name, data)
    write_atomically(folder / INDEX_NAME, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    for other in folder.glob("soft_prompts-*.safetensors"):
        if other.name != name:
            other.unlink()


def load_folder(folder: Path) -> Saved:
    """Read and check a folder that `save_folder` wrote.

    Raises:
        SoftPromptError: a file that is missing, damaged, of another format, or does not fit the other file.
    """
    index = _read_index(folder)
    path = folder / _field(index, folder, "tensors", str)
    if path.parent != folder or path.suffix != ".safetensors":
        raise SoftPromptError(f"{folder / INDEX_NAME} names its tensors {path.name!r} outside its folder; save anew")
    if not path.is_file():
        raise SoftPromptError(f"{path} is missing, though {INDEX_NAME} names it; copy the whole folder again")
    data = path.read_bytes()
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise SoftPromptError(
            f"{path} is truncated or not a safetensors file ({error}); copy it again or train anew"
        ) from error
    hidden_size = _field(index, folder, "hidden_size", int)
    try:
        entries = [Entry(**entry) for entry in _field(index, folder, "tasks", list)]
        base = _base_model(index.get("base_model"))
    except (TypeError, KeyError) as error:
        raise SoftPromptError(f"{folder / INDEX_NAME} is damaged ({error}); copy it again or train anew") from error
    prompts = {check_task_name(entry.task): _check_tensor(path, entry, tensors, hidden_size) for entry in entries}
    if len(prompts) != len(tensors) or len(prompts) != len(entries):
        raise SoftPromptError(f"{path} and {INDEX_NAME} do not hold the same tasks; copy the whole folder again")
    if hashlib.sha256(data).hexdigest() != _field(index, folder, "sha256", str):
        raise SoftPromptError(f"{path} is not the file that {INDEX_NAME} was written with; copy the whole folder again")
    return Saved(hidden_size, base, entries, prompts)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file and rename that to `path`, so that nobody ever reads half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read. Saved prompts get the usual permissions of new files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise SoftPromptError(f"{folder} holds no saved prompts: there is no {INDEX_NAME}; give the folder of a save")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SoftPromptError(f"{path} is truncated or not JSON ({error}); copy it again or train anew") from error
    if not isinstance(index, dict) or "format_version" not in index:
        raise SoftPromptError(f"{path} is not an index of saved prompts; give the folder of a save")
    if index["format_version"] != FORMAT_VERSION:
        raise SoftPromptError(
            f"{path} has format version {index['format_version']!r} (written by lightning-softprompt "
            f"{index.get('library_version', 'unknown')}), this library reads {FORMAT_VERSION}; upgrade it"
        )
    return index


def _field(index: dict[str, Any], folder: Path, name: str, kind: type) -> Any:
    value = index.get(name)
    if not isinstance(value, kind):
        raise SoftPromptError(f"{folder / INDEX_NAME}: {name!r} must be a {kind.__name__}, found {value!r}; save anew")
    return value


def _base_model(fields: dict[str, Any] | None) -> BaseModel | None:
    if fields is None:
        return None
    return BaseModel(fields["name"], fields["hidden_size"], tuple(fields["ids"]), tuple(fields["fingerprint"]))


def _check_tensor(path: Path, entry: Entry, tensors: dict[str, Tensor], hidden_size: int) -> Tensor:
    tensor = tensors.get(KEY + str(entry.task))
    if tensor is None:
        raise SoftPromptError(f"{path} has no prompt of task {entry.task!r}; copy the whole folder again")
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (entry.length, hidden_size):
        raise SoftPromptError(
            f"{path}: the prompt of task {entry.task!r} should be float32 [{entry.length}, {hidden_size}], found "
            f"{tensor.dtype} {list(tensor.shape)}; copy the whole folder again"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise SoftPromptError(f"{path}: the prompt of task {entry.task!r} holds NaN or Inf; train it again")
    return tensor
