"""What rows of a data file look like: which column names the task, which is the target, and of what kind it is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import TaskTemplate, value_text

Row = Mapping[str, Any]

# Names by which people call what is to be answered, the likelier ones first.
_TARGETS = (
    *("label", "labels", "target", "answer", "output", "completion", "response", "summary"),
    *("class", "category", "intent", "sentiment", "topic", "title", "gold", "y"),
)
_TEXTS = ["text", "sentence", "review", "question", "prompt", "input", "content", "document", "context", "instruction"]
_MOST_LABELS, _LONGEST_LABEL = 50, 40
_MOST_TASKS, _LEAST_ROWS = 20, 5
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500


@dataclass
class Task:
    """What is guessed of one task.

    Attributes:
        name: its name.
        target: the column that is to be answered.
        template: a first template.
        rows: its rows.
    """

    name: str
    target: str
    template: TaskTemplate
    rows: list[Row]


def columns_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The columns of some rows, each with the first value in it that is not empty."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name) in (None, ""):
                found[name] = value
    return found


def survey(rows: Sequence[Row], task: str, task_column: str, target: str | None = None) -> list[Task]:
    """Guess the tasks of some rows.

    Args:
        rows: the rows.
        task: the name of the task where no column names it.
        task_column: the column that names a row's task, if there is one of that name.
        target: the column that is to be answered; None guesses it.

    Raises:
        SoftPromptError: rows in which no text and no target can be found, or a name that no task can have.
    """
    by_task: dict[str, list[Row]] = {}
    column = named_by(rows, task_column)
    for row in rows:
        if column is None or not _is_empty(row, column):
            by_task.setdefault(task if column is None else check_task_name(value_text(row[column])), []).append(row)
    return [_guess(name, of_task, task_column, target) for name, of_task in by_task.items()]


def named_by(rows: Sequence[Row], task_column: str) -> str | None:
    """The column that names each row's task; None if no row has it."""
    return None if all(_is_empty(row, task_column) for row in rows) else task_column


def names_tasks(rows: Sequence[Row], tasks: Sequence[Task]) -> tuple[str, list[str]] | None:
    """The one column, beside those that are answered, that may well name the tasks, with its values; None for none."""
    found = []
    for column in columns_of(rows):
        values = [row.get(column) for row in rows]
        are_names = all(isinstance(value, str) and value.strip() and not _is_number(value) for value in values)
        kinds = list(dict.fromkeys(map(str, values))) if are_names else []
        is_answered = column in [task.target for task in tasks]
        if not is_answered and 1 < len(kinds) <= _MOST_TASKS and _LEAST_ROWS * len(kinds) <= len(rows):
            found.append((column, kinds))
    return found[0] if len(found) == 1 else None


def split(tasks: Sequence[Task], seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows: of each task, and of each of its labels, a tenth is held out.

    Rows of one text stay together, so that no text that trains is held out.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for task in tasks:
        by_text: dict[str, list[Row]] = {}
        for number, row in enumerate(task.rows):
            by_text.setdefault(task.template.render_text(row, f"row {number + 1}"), []).append(row)
        texts = list(by_text.values())
        random.Random(f"{seed} {task.name}").shuffle(texts)
        kinds: dict[str, list[list[Row]]] = {}
        for rows in texts:
            kinds.setdefault(str(rows[0][task.target]) if task.template.labels else "", []).append(rows)
        for of_kind in kinds.values():
            count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(of_kind)))) if len(of_kind) > 1 else 0
            held_out += [row for rows in of_kind[:count] for row in rows]
            train += [row for rows in of_kind[count:] for row in rows]
    return train, held_out


def _guess(name: str, rows: list[Row], task_column: str, target: str | None) -> Task:
    columns = [column for column in columns_of(rows) if column != task_column]
    target = _target_of(name, rows, columns, target)
    others = [column for column in columns if column != target]
    texts = [column for column in others if column.lower() in _TEXTS or _is_text(rows, column)] or others
    if not texts:
        raise SoftPromptError(f"task {name!r} has the column {target!r} alone; a row needs a text and what to answer")
    text = "\n".join(f"{{{column}}}" for column in texts)
    kept = [row for row in rows if not any(_is_empty(row, column) for column in (*texts, target))]
    if not kept:
        raise SoftPromptError(f"task {name!r} has no row with all of {', '.join(map(repr, [*texts, target]))}")
    cue = target.replace("_", " ").capitalize()
    template = TaskTemplate(f"{text}\n{cue}:", f" {{{target}}}")
    answers = [template.render_target(row, f"row {number + 1}") for number, row in enumerate(kept)]
    labels = sorted(set(answers))
    if _are_labels(labels, len(answers)):
        template.labels = labels
    return Task(name, target, template, kept)


def _are_labels(kinds: Sequence[str], rows: int) -> bool:
    """Whether the different answers of a task are few and short, and each comes twice on average."""
    return 1 < len(kinds) <= _MOST_LABELS and 2 * len(kinds) <= rows and max(map(len, kinds)) <= _LONGEST_LABEL


def _target_of(task: str, rows: list[Row], columns: list[str], given: str | None) -> str:
    if given is not None:
        if given not in columns:
            raise SoftPromptError(f"there is no column {given!r}; columns: {', '.join(map(repr, columns))}")
        return given
    by_name = {column.lower(): column for column in reversed(columns)}
    named = next((by_name[name] for name in _TARGETS if name in by_name), None)
    if named is not None:
        return named
    if len(columns) < 2:
        found = ", ".join(map(repr, columns)) or "none"
        raise SoftPromptError(f"task {task!r} needs a column of texts and one of what to answer; columns: {found}")
    kinds = {column: {str(row.get(column)) for row in rows} for column in columns}
    fewest = min(columns, key=lambda column: len(kinds[column]))
    return fewest if _are_labels([*kinds[fewest]], len(rows)) else columns[-1]


def _is_text(rows: list[Row], column: str) -> bool:
    """Whether a column holds what a model is to read, which is texts of some words, and no numbers or names."""
    values = [str(row[column]) for row in rows if not _is_empty(row, column)]
    return sum(" " in value.strip() for value in values) * 2 > len(values)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_empty(row: Row, column: str) -> bool:
    return row.get(column) is None or not str(row[column]).strip()
