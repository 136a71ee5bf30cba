"""The files of saved prompts: one safetensors file, one JSON file and a model card, which a new save replaces together.

One writer at a time changes a folder, and a reader beside it always sees one whole state.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import shown, without_control
from lightning_softprompt.prompts.files import errors_name, write_new, writing
from lightning_softprompt.prompts.index import INDEX_NAME, Description, Entry, Index, read_index, written_index
from lightning_softprompt.prompts.model_card import CARD_NAME, may_replace, model_card
from lightning_softprompt.prompts.task_names import KEY

TENSOR_FILES = "soft_prompts-*.safetensors"
# What a writer that was killed left; those of the first format had the second pattern, too.
_LEFTOVERS = (".soft_prompts-*", f".{INDEX_NAME}.*")
_ATTEMPTS = 20


@dataclass(frozen=True)
class Saved(Description):
    """The content of a saved folder; `tensors` maps each task to its prompt, float32 `[length, hidden]`."""

    tensors: dict[str, Tensor]


def save_folder(folder: Path, saved: Saved, called: str | None = None) -> None:
    """Write `saved` into `folder`, in place of what an earlier save wrote there.

    The tensors go into a file that is named after their hash. The last rename puts the JSON file in place, which names
    the file of the tensors. If saving fails before that rename, the earlier save is still complete. After it, the
    earlier tensors are removed.

    Args:
        folder: the folder; it is made if it does not exist.
        saved: the content.
        called: how the model card calls the folder; None stands for its name.

    Raises:
        SoftPromptError: a prompt that holds NaN or Inf, a template that cannot be used, or a folder that cannot be
            written. The prompts that were in the folder are still there.
    """
    for task, tensor in saved.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SoftPromptError(f"the prompt of task {task!r} holds NaN or Inf and is not saved; train it again")
    data = save_tensors({KEY + task: tensor for task, tensor in saved.tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    # Names and starts are only shown, so control characters in them must not be what a training ends with.
    base = saved.base and replace(saved.base, name=without_control(saved.base.name))
    entries = [replace(entry, start=without_control(entry.start)) for entry in saved.entries]
    name = f"soft_prompts-{digest[:12]}.safetensors"
    index = written_index(Index(saved.hidden_size, base, entries, name, digest))
    read_index(index, folder / INDEX_NAME)  # what is written must load again
    card = model_card(entries, base, called or folder.resolve().name)
    files = {name: data, CARD_NAME: card.encode(), INDEX_NAME: index}
    with writing(folder), errors_name(folder):
        _replace_files(folder, files)


def load_folder(folder: Path) -> Saved:
    """Read and check a folder that `save_folder` wrote.

    Raises:
        SoftPromptError: a file that is missing, damaged, of another format, or does not fit the other file.
    """
    index, data = _read_whole(folder)
    path = folder / index.tensors
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise SoftPromptError(
            f"{path} is truncated or not a safetensors file ({shown(str(error))}); copy it again or train anew"
        ) from error
    prompts = {entry.task: _check_tensor(path, entry, tensors, index.hidden_size) for entry in index.entries}
    if len(prompts) != len(tensors):
        raise SoftPromptError(f"{path} and {INDEX_NAME} do not hold the same tasks; copy the whole folder again")
    if hashlib.sha256(data).hexdigest() != index.sha256:
        raise SoftPromptError(f"{path} is not the file that {INDEX_NAME} was written with; copy the whole folder again")
    return Saved(index.hidden_size, index.base, index.entries, prompts)


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Put these files in place, the last of them last, and remove the tensors and temporary files of other writers."""
    for leftover in (path for pattern in _LEFTOVERS for path in folder.glob(pattern)):
        leftover.unlink()
    earlier = sorted(folder.glob(TENSOR_FILES))
    if not may_replace(folder / CARD_NAME):
        files = {name: data for name, data in files.items() if name != CARD_NAME}
    staged: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            temporary = folder / f".soft_prompts-{secrets.token_hex(8)}"
            replaced = earlier[-1] if earlier and name.endswith(".safetensors") else folder / name
            write_new(temporary, data, replaced)
            staged[temporary] = folder / name
        for temporary, target in staged.items():
            os.replace(temporary, target)
    except BaseException:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the new save is complete; the next writer tries again
        for path in earlier:
            if path.name not in files:
                path.unlink()


def _read_whole(folder: Path) -> tuple[Index, bytes]:
    """Read the index and the file of tensors that it names, both of one save."""
    path = folder / INDEX_NAME
    for attempt in range(_ATTEMPTS):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            saved = [str(inner.parent) for inner in sorted(folder.glob(f"*/{INDEX_NAME}"))]
            mend = f"do you mean {' or '.join(saved)}?" if saved else "give the folder of a save, or a checkpoint"
            raise SoftPromptError(f"{folder} holds no saved prompts: there is no {INDEX_NAME}; {mend}") from error
        except OSError as error:
            raise SoftPromptError(f"{path} cannot be read ({error}); copy the whole folder again") from error
        index = read_index(data, path)
        try:
            return index, (folder / index.tensors).read_bytes()
        except FileNotFoundError:
            time.sleep(0.002 * attempt)  # a writer has put another save in place since the index was read
        except OSError as error:
            raise SoftPromptError(f"{folder / index.tensors} cannot be read ({error}); copy it again") from error
    raise SoftPromptError(
        f"{folder / index.tensors} is missing, though {INDEX_NAME} names it; copy the whole folder again"
    )


def _check_tensor(path: Path, entry: Entry, tensors: dict[str, Tensor], hidden_size: int) -> Tensor:
    tensor = tensors.get(KEY + entry.task)
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
