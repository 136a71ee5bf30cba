"""The command `init`: a commented config for a data file of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from lightning_softprompt.cli.output import check_not_read, say, write_rows
from lightning_softprompt.cli.survey import Task, columns_of, named_by, names_tasks, split, survey
from lightning_softprompt.cli.terminal import in_one_line
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import has_control
from lightning_softprompt.prompts.files import write_atomically
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import check_templates

_BATCH, _STEPS = 16, 300
_FEW = 20  # held-out rows of a task
_NAMED = 10  # labels in a start


def init(
    data: str,
    base: str,
    output: str = "run.yaml",
    task: str | None = None,
    task_column: str = "task",
    target: str | None = None,
    validation: str | None = None,
    seed: int = 0,
    force: bool = False,
    json: bool = False,
) -> None:
    """Look at a data file and write a commented config, which `fit` runs as it is.

    The column `task`, or the one that is given, names the tasks. Of each it is guessed which column is to be answered,
    and whether the answers are labels or free text. Without validation rows, a tenth of the rows of each task is held
    out: two files beside the config hold the rows that train and those that are held out.

    Args:
        data: file of rows, JSONL, CSV or Parquet.
        base: hub id or path of the base model. It is not loaded.
        output: config to write.
        task: name of the task, where no column names it; default: the name of the file.
        task_column: column that names each row's task.
        target: column that is to be answered; default: guessed.
        validation: file of validation rows; then nothing is held out, and the data are used where they are.
        seed: seed of which rows are held out.
        force: write over files that exist.
        json: print what was done as JSON.
    """
    from lightning_softprompt.data.sources import Source

    _check_words(base, data, validation)
    path, *parts = _files(output, data, validation, force)
    rows = [row for _, row in Source(data).rows("train")]
    if task_column != "task" and named_by(rows, task_column) is None:
        known = ", ".join(map(repr, columns_of(rows)))
        raise SoftPromptError(f"no row names its task in a column {task_column!r}; columns: {known}")
    tasks = survey(rows, check_task_name(task or _stem(data)), task_column, target)
    check_templates({each.name: each.template for each in tasks})
    train, held_out = ([], []) if validation else split(tasks, seed)
    if not validation and not (train and held_out):
        raise SoftPromptError(f"{data} has {len(rows)} rows, too few to hold some out; add rows, or give --validation")
    sources = [data, validation] if validation else [str(each) for each in parts]
    left_out = len(rows) - sum(len(each.rows) for each in tasks)
    column = named_by(rows, task_column)
    unusable = left_out if validation else 0  # the files that are written hold no row that cannot be used
    text = _config(base, tasks, columns_of(rows), sources, column, len(train or rows), seed, unusable)
    path.parent.mkdir(parents=True, exist_ok=True)
    for each, held in zip(parts, (train, held_out), strict=False):
        write_rows(each, [dict(row) for row in held])
    write_atomically(path, text.encode())
    hint = _hint(rows, tasks) if column is None and task is None else None
    _report(path, tasks, len(train or rows), held_out, left_out, hint, json)


def _check_words(base: str, data: str, validation: str | None) -> None:
    for option, value in (("--base", base), ("--data", data), ("--validation", validation or "")):
        if has_control(value):
            raise SoftPromptError(f"{option} holds control characters, which have no place in a config: {value!r}")


def _files(output: str, data: str, validation: str | None, force: bool) -> list[Path]:
    """The files to write, of which none is read, and none exists unless `force`: the config, and those of the rows."""
    path = Path(output)
    if not path.name:
        raise SoftPromptError(f"{output!r} is a folder; give --output the name of a file in it")
    files = [path] if validation else [path, path.with_suffix(".train.jsonl"), path.with_suffix(".validation.jsonl")]
    for each in files:
        check_not_read(each, data, *([validation] if validation else []))
    existing = [str(each) for each in files if each.exists()]
    if existing and not force:
        raise SoftPromptError(
            f"there is already {' and '.join(existing)}; give another --output, or --force to replace"
        )
    return files


def _hint(rows: list[Any], tasks: list[Task]) -> str | None:
    """Which column may name the tasks, where there is no column `task`."""
    found = names_tasks(rows, tasks)
    if found is None:
        return None
    column, kinds = found
    shown = ", ".join(kinds[:4])[:80] + (", …" if len(kinds) > 4 else "")
    return in_one_line(f"no column 'task': if {column!r} ({shown}) names it, give --task_column {shlex.quote(column)}")


def _report(
    path: Path, tasks: list[Task], trained: int, held_out: list[Any], left_out: int, hint: str | None, json: bool
) -> None:
    found = [
        {"task": each.name, "target": each.target, "labels": each.template.labels, "rows": len(each.rows)}
        for each in tasks
    ]
    lines = [f"{each.name}: {len(each.rows)} rows, {_kind(each)}" for each in tasks]
    lines += [f"rows with an empty column, which are left out: {left_out}"] if left_out else []
    lines += [hint] if hint else []
    kept = f"{len(held_out)} row{'s are' if len(held_out) > 1 else ' is'} held out"
    few = f"only {kept}, too few to judge by: give --validation if you have more"
    split_up = f"{trained} rows train; {few if len(held_out) < _FEW * len(tasks) else kept}\n" if held_out else ""
    words = "\n".join(lines) + f"\n{split_up}{path} is written; look at its templates, then: "
    done = {"config": str(path), "tasks": found, "train": trained, "held_out": len(held_out)}
    done |= {"left_out": left_out, "hint": hint}
    say(done, json, f"{words}lightning-softprompt fit --config {shlex.quote(str(path))}")


def _kind(task: Task) -> str:
    labels = task.template.labels
    if labels is None:
        return f"free text from the column {task.target!r}"
    shown = ", ".join(label.strip() for label in labels[:8])
    return f"{len(labels)} labels from the column {task.target!r} ({shown}{', …' if len(labels) > 8 else ''})"


def _config(
    base: str,
    tasks: list[Task],
    columns: dict[str, Any],
    sources: list[str],
    task_column: str | None,
    rows: int,
    seed: int,
    left_out: int,
) -> str:
    """The config. Everything that comes from the data stands between quotes, or is a comment of one line."""
    steps = -(-rows // _BATCH)
    epochs = max(1, round(_STEPS / steps))
    lines = [
        "# Written by `lightning-softprompt init` from a look at the data; all of it may be changed.",
        "#",
        "# Columns of the data, each with a first value:",
        *(f"#   {in_one_line(name)}: {in_one_line(str(value))[:80]}" for name, value in columns.items()),
        f"seed_everything: {seed}",
        "",
        "prompts:                     # SoftPromptCallback",
        "  tasks:",
        "    # How each prompt starts: a text, or a number of virtual tokens. Your own words for the task are better",
        "    # than these.",
        *(f"    {_quoted(each.name)}: {_quoted(_instruction(each))}" for each in tasks),
        "",
        "model:",
        "  class_path: lightning_softprompt.CausalLMModule",
        "  init_args:",
        f"    base: {_quoted(base)}",
        "    # Its rate rises over the first steps and then falls to zero.",
        "    # optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.02, weight_decay: 0.0}}",
        "    # objective: labels       # train tasks with labels among their labels alone, in place of all tokens",
        "",
        *_data(base, tasks, sources, task_column, left_out),
        "",
        "trainer:",
        f"  max_epochs: {epochs}             # of {steps} steps: {epochs * steps} in all",
        "  accelerator: auto",
        "  log_every_n_steps: 1",
        "  callbacks:",
        "    - class_path: lightning_softprompt.CollapseGuard  # puts a task back that goes wrong",
        "    # - class_path: lightning_softprompt.PromptGradientClipping  # in place of gradients of norm 1",
    ]
    return "\n".join(lines) + "\n"


def _data(base: str, tasks: list[Task], sources: list[str], task_column: str | None, left_out: int) -> list[str]:
    train, validation, new = (
        _quoted(each) if task_column else f"{{path: {_quoted(each)}, task: {_quoted(tasks[0].name)}}}"
        for each in (*sources, "new.jsonl")
    )
    return [
        "data:",
        "  class_path: lightning_softprompt.TaskDataModule",
        "  init_args:",
        f"    tokenizer: {_quoted(base)}",
        "    tasks:",
        *(line for each in tasks for line in _template(each)),
        *([f"    task_column: {_quoted(task_column)}"] if task_column and task_column != "task" else []),
        f"    train: {train}",
        f"    validation: {validation}",
        f"    # predict: {new}          # rows that `predict` answers",
        f"    batch_size: {_BATCH}",
        *([f"    strict: false             # leaves out rows with an empty column: {left_out}"] if left_out else []),
        "    # max_length: 512         # tokens of a row; longer texts lose their end",
    ]


def _template(task: Task) -> list[str]:
    found = task.template
    kind = "labels: the answer is the likeliest of them" if found.labels else "free text"
    lines = [
        f"      {_quoted(task.name)}:               # {len(task.rows)} rows, {kind}",
        f"        text: {_quoted(found.text)}         # {{column}} stands for the value of that column",
        f"        target: {_quoted(found.target)}     # what the model is to write behind the text",
    ]
    if found.labels:
        lines += ["        labels:", *(f"          - {_quoted(label)}" for label in found.labels)]
    return [
        *lines,
        "        # chat: true            # for a base that follows instructions; targets then need no space",
    ]


def _instruction(task: Task) -> str:
    what = task.target.replace("_", " ")
    if not task.template.labels:
        return f"Write the {what} for the text."
    *first, last = [label.strip() for label in task.template.labels]
    if len(first) >= _NAMED:
        first, last = first[:_NAMED], "another"
    return f"Which {what} fits the text: {', '.join(first)} or {last}?"


def _quoted(text: str) -> str:
    """A text as YAML in one line, whatever is in it."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _stem(data: str) -> str:
    """The name of a file without its endings, as a task may be called."""
    return Path(data).name.split(".")[0].strip() or "task"
