"""What is said of prompts beside their values, of the base and of each task: in a folder's index and in a checkpoint.

Both come from elsewhere, so nothing of them is believed: each field is checked for its type and for what could do harm,
and errors show its values without control characters, which a terminal would obey.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_softprompt import __version__
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import has_control, shown
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates

# Version 1 had no templates.
FORMAT_VERSION = 2
INDEX_NAME = "soft_prompts.json"
_MEND = "copy it again or save anew"
_NAMES = {list: "list", int: "int", str: "str", bool: "bool"}


@dataclass(frozen=True)
class Entry:
    """One task of a saved folder: its name, its prompt's length and start, whether it is frozen, and its template."""

    task: str
    length: int
    start: str
    frozen: bool
    template: TaskTemplate | None = None


@dataclass(frozen=True)
class Description:
    """What is said of prompts beside their values.

    Attributes:
        hidden_size: width of a virtual token.
        base: the base model; None if it is not known.
        entries: the tasks, in their order.
    """

    hidden_size: int
    base: BaseModel | None
    entries: list[Entry]

    def content(self) -> dict[str, Any]:
        """The description as texts, numbers, lists and dicts."""
        base = None if self.base is None else asdict(self.base)
        return {
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "hidden_size": self.hidden_size,
            "base_model": base and {**base, "ids": list(base["ids"]), "fingerprint": list(base["fingerprint"])},
            "tasks": [asdict(entry) for entry in self.entries],
        }


@dataclass(frozen=True)
class Index(Description):
    """What the index of a folder says.

    Attributes:
        tensors: name of the file that holds the prompts.
        sha256: hash of that file.
    """

    tensors: str
    sha256: str


def written_index(index: Index) -> bytes:
    """The content of the file `soft_prompts.json`."""
    content = {**index.content(), "tensors": index.tensors, "sha256": index.sha256}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read_index(data: bytes, path: Path) -> Index:
    """Read and check an index; `path` names it in errors.

    Raises:
        SoftPromptError: a file that is not an index, of another format, or with a value that cannot be.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SoftPromptError(f"{path} is truncated or not JSON ({error}); copy it again or train anew") from error
    found = read_description(content, path)
    assert isinstance(content, dict)
    tensors = _text(content, "tensors", path)
    if Path(tensors).name != tensors or "\\" in tensors or not tensors.endswith(".safetensors"):
        raise SoftPromptError(f"{path} names its tensors {shown(tensors)} outside its folder; save anew")
    return Index(found.hidden_size, found.base, found.entries, tensors, _text(content, "sha256", path))


def read_description(content: object, where: str | Path) -> Description:
    """Read and check a description; `where` names what holds it in errors.

    Raises:
        SoftPromptError: no description, one of another format, or one with a value that cannot be.
    """
    if not isinstance(content, dict) or "format_version" not in content:
        raise SoftPromptError(f"{where} does not describe its prompts; give the folder of a save, or a checkpoint")
    version = content["format_version"]
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
        raise SoftPromptError(
            f"{where} has format version {shown(version)} (written by lightning-softprompt "
            f"{shown(content.get('library_version'))}), this library reads 1 and {FORMAT_VERSION}; upgrade it"
        )
    _text(content, "library_version", where)
    width, base = _size(content, "hidden_size", where), _base(content.get("base_model"), where)
    entries = [_entry(each, version, where) for each in _typed(content, "tasks", where, list)]
    if len({entry.task for entry in entries}) < len(entries):
        raise SoftPromptError(f"{where} holds a task twice; {_MEND}")
    return Description(width, base, entries)


def template_of(content: object, task: str, path: str | Path) -> TaskTemplate:
    """The template of a task from what a file says, checked; `path` names the file in errors."""
    names = [field.name for field in fields(TaskTemplate)]
    if isinstance(content, dict):  # folders that were saved before this field was there do not say it
        content = {"special_tokens": False, **content}
    template = TaskTemplate(**_object(content, names, f"the template of task {task!r}", path))
    try:
        check_templates({task: template})
    except SoftPromptError as error:
        raise SoftPromptError(f"{path}: {error}") from error
    return template


def _entry(content: object, version: int, where: str | Path) -> Entry:
    names = [field.name for field in fields(Entry) if version > 1 or field.name != "template"]
    found = _object(content, names, "each task", where)
    try:
        task = check_task_name(found["task"])
    except SoftPromptError as error:
        raise SoftPromptError(f"{where}: {error}") from error
    length, start = _size(found, "length", where), _text(found, "start", where)
    template = found.get("template")
    checked = None if template is None else template_of(template, task, where)
    return Entry(task, length, start, _typed(found, "frozen", where, bool), checked)


def _base(content: object, where: str | Path) -> BaseModel | None:
    if content is None:
        return None
    found = _object(content, ["name", "hidden_size", "ids", "fingerprint"], "'base_model'", where)
    ids, values = _typed(found, "ids", where, list), _typed(found, "fingerprint", where, list)
    if not all(_is_whole(each, 0) for each in ids) or not all(_is_finite(each) for each in values):
        raise SoftPromptError(f"{where} is damaged: 'ids' and 'fingerprint' of the base must hold numbers; {_MEND}")
    width = _size(found, "hidden_size", where)
    return BaseModel(_text(found, "name", where), width, tuple(ids), tuple(map(float, values)))


def _object(content: object, names: Sequence[str], what: str, where: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict) or set(content) != set(names):
        found = sorted(content) if isinstance(content, dict) else content
        raise SoftPromptError(
            f"{where} is damaged: {what} must have the fields {', '.join(names)}, found {shown(found)}; {_MEND}"
        )
    return content


def _typed(content: dict[str, Any], name: str, where: str | Path, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SoftPromptError(f"{where}: {name!r} must be a {_NAMES[kind]}, found {shown(value)}; {_MEND}")
    return value


def _text(content: dict[str, Any], name: str, where: str | Path) -> str:
    value: str = _typed(content, name, where, str)
    if has_control(value):
        raise SoftPromptError(f"{where}: {name!r} must not hold control characters, found {shown(value)}; {_MEND}")
    return value


def _size(content: dict[str, Any], name: str, where: str | Path) -> int:
    value: int = _typed(content, name, where, int)
    if not _is_whole(value, 1):
        raise SoftPromptError(f"{where}: {name!r} must be at least 1, found {shown(value)}; {_MEND}")
    return value


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_finite(value: object) -> bool:
    # A whole number in JSON may be too large for a float.
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value, -(2**63))
