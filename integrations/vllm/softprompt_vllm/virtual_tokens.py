"""The tasks of a folder that `lightning-softprompt export-model` wrote: prompts are tokens of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.tasks import Task

INDEX_NAME = "virtual_tokens.json"


def read_virtual_tokens(folder: Path, vocabulary: int) -> dict[str, Task]:
    """The tasks of an export. They have no templates: a text goes behind the virtual tokens as it is.

    Args:
        folder: the folder, which holds `virtual_tokens.json`: `tasks` maps each task to the ids of its virtual tokens,
            and `start` has the ids that stand between them and a text.
        vocabulary: the number of ids that the served model's embedding has.

    Raises:
        SoftPromptError: a file that is damaged, or ids that the model does not have.
    """
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
        start, tasks = index["start"], index["tasks"]
        made = {name: Task(name, (*_ids(ids, vocabulary), *_ids(start, vocabulary))) for name, ids in tasks.items()}
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise SoftPromptError(f"{path} cannot be read ({error}); export the model again") from error
    if not made or not all(tasks.values()):
        raise SoftPromptError(f"{path} has no tasks, or one without virtual tokens; export the model again")
    return made


def _ids(found: Any, vocabulary: int) -> list[int]:
    if not isinstance(found, list) or not all(type(each) is int and 0 <= each < vocabulary for each in found):
        raise ValueError(f"expected ids from 0 to {vocabulary - 1}, found {found!r:.80}")
    return found
