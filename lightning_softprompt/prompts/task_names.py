"""Which texts can name a task, and the name of the parameter that is the task's prompt."""

from __future__ import annotations

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import is_control, shown

KEY = "prompt:"


def check_task_name(task: object) -> str:
    """Return `task` if it can name a task, else raise a `SoftPromptError`."""
    if not isinstance(task, str) or not task.strip():
        is_yaml = isinstance(task, bool | int | float)
        quotes = "; put quotes around it: YAML takes no, yes, on, off and digits for something else" if is_yaml else ""
        raise SoftPromptError(f"a task name is a non-empty text, got {shown(task)}{quotes}")
    if task in (".", "..") or any(_is_refused(character) for character in task):
        better = "".join("-" if _is_refused(character) else character for character in task).strip(".-") or "task"
        raise SoftPromptError(
            f"a task name has no path separators and no control characters, got {task!r}; use for example {better!r}"
        )
    return task


def escape(task: str) -> str:
    """The task's name with its dots replaced, as `nn.Module` takes a dot for the beginning of a submodule's name."""
    return task.replace("%", "%25").replace(".", "%2E")


def parameter_name(task: str) -> str:
    """The name of a task's parameter inside `SoftPrompts`."""
    return KEY + escape(task)


def task_of_parameter(name: str) -> str:
    """The task whose parameter is called `name`."""
    return name.removeprefix(KEY).replace("%2E", ".").replace("%25", "%")


def _is_refused(character: str) -> bool:
    return character in "/\\" or is_control(character)
