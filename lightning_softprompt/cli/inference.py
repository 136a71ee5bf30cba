"""The commands that answer the rows of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.answer_columns import label_columns, text_columns
from lightning_softprompt.cli.loaded_base import loaded_base
from lightning_softprompt.cli.output import RowWriter, check_not_read, say
from lightning_softprompt.cli.request_rows import RequestRow, read_request_rows
from lightning_softprompt.errors import SoftPromptError, check_at_least_one
from lightning_softprompt.json_values import dumps
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates


def generate(
    base: str,
    prompts: str,
    input: str,
    output: str,
    task_column: str = "task",
    template: str | None = None,
    max_new_tokens: int = 64,
    max_batch_tokens: int = 16_384,
    chat: bool = False,
    system: str | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    json: bool = False,
) -> None:
    """Answer the rows of a file, many tasks in one batch.

    Each task's own template turns its rows into texts, and its labels or free text into answers. Answers are written as
    they come. A row that cannot be answered stops no other one: it is written with an `error` in place of its `output`,
    and the exit status is 1.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` leaves it, a checkpoint of a run, or an id on the hub.
        input: file of rows, JSONL, CSV or Parquet; each has a `task` (null: no prompt) and the columns of its template,
            or a `text`. Where the prompts are those of one task, rows need not name it.
        output: JSONL file to write: the rows, each with its `output`, and the `probabilities` of its task's labels; or
            with its `error`.
        task_column: column that names each row's task.
        template: one input for all tasks, in place of their own; {column} stands for a column of the row. The answers
            are free text then.
        max_new_tokens: most tokens of an answer.
        max_batch_tokens: most tokens of a batch, prompts, texts and answers together; what fits the memory.
        chat: put the text of that template into the tokenizer's chat template.
        system: what the system says in that chat.
        resume: go on behind the rows that the output holds already, as after an interruption.
        device: device of the model, such as cuda:1; auto is a GPU where there is one.
        dtype: dtype of the model, such as bfloat16; auto is that of its files.
        json: print what was done as JSON.
    """
    is_raw = template is not None or chat or system is not None
    shared = TaskTemplate(template or "{text}", chat=chat, system=system) if is_raw else None
    if shared is not None:
        check_templates({"--template": shared})

    def answer(generator: Any, chosen: Sequence[RequestRow]) -> list[dict[str, Any]]:
        budgets = {"max_new_tokens": max_new_tokens, "max_batch_tokens": max_batch_tokens}
        texts = None if shared is None else _texts(generator, shared, chosen)
        asked = [row for row in chosen if not row.error]
        tasks = [row.task for row in asked]
        if texts is None:
            answers = generator.answer([_given(row, generator.prompts) for row in asked], tasks, **budgets)
        else:
            answers = generator.generate(texts, tasks, **budgets)
        return text_columns(answers, [row.where for row in asked])

    check_at_least_one(max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens)
    check_not_read(Path(output), input)
    known = SoftPrompts.from_pretrained(prompts)
    rows = _read(input, task_column, known, shared, ("output", "probabilities", "error"))
    at_once = max(1, 4 * max_batch_tokens // (max_new_tokens + 64))  # some batches, so that lengths can be sorted
    load = partial(loaded_base, base, device, dtype)
    _report(_answer_file(load, known, rows, output, resume, at_once, answer), rows, output, json)


def classify(
    base: str,
    prompts: str,
    input: str,
    output: str,
    task_column: str = "task",
    max_batch_tokens: int = 16_384,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    json: bool = False,
) -> None:
    """Give each row of a file the likeliest of its task's labels, and the probabilities of all.

    A row that cannot be classified stops no other one: it is written with an `error`, and the exit status is 1.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` leaves it, a checkpoint of a run, or an id on the hub.
        input: file of rows, JSONL, CSV or Parquet; each has a `task` and the columns of its template. Where the prompts
            are those of one task, rows need not name it.
        output: JSONL file to write: the rows, each with its `label` and `probabilities`, or its `error`.
        task_column: column that names each row's task.
        max_batch_tokens: most tokens of a batch, prompts, texts and labels together; what fits the memory.
        resume: go on behind the rows that the output holds already, as after an interruption.
        device: device of the model, such as cuda:1; auto is a GPU where there is one.
        dtype: dtype of the model, such as bfloat16; auto is that of its files.
        json: print what was done as JSON.
    """

    def answer(generator: Any, chosen: Sequence[RequestRow]) -> list[dict[str, Any]]:
        tasks = [row.task for row in chosen]
        found = generator.classify([row.given for row in chosen], tasks, max_batch_tokens)
        return label_columns(found, [row.where for row in chosen])

    check_at_least_one(max_batch_tokens=max_batch_tokens)
    check_not_read(Path(output), input)
    known = SoftPrompts.from_pretrained(prompts)
    rows = _read(input, task_column, known, None, ("label", "probabilities", "error"))
    for row in rows:
        task = row.task
        if not row.error and (task not in known.templates or known.templates[task].labels is None):
            row.error = f"{row.where}: the task {task!r} has no labels to choose from; use generate"
    if all(row.error for row in rows):
        raise SoftPromptError(rows[0].error)
    load, at_once = partial(loaded_base, base, device, dtype), max(1, max_batch_tokens // 32)
    _report(_answer_file(load, known, rows, output, resume, at_once, answer), rows, output, json)


def _given(row: RequestRow, prompts: SoftPrompts) -> Any:
    """The columns of a row, which its task's template takes; its text where there is no template."""
    return row.given if row.task in prompts.templates else row.given.get("text")


def _texts(generator: Any, template: TaskTemplate, chosen: Sequence[RequestRow]) -> list[list[int]]:
    """The ids of the rows' texts. A row that the tokenizer cannot read gets its error in place of them."""
    from lightning_softprompt.prompts.template_encoding import TaskEncoding

    encoding = TaskEncoding.of(generator.tokenizer, "--template", template)
    texts = []
    for row in chosen:
        try:
            texts.append(encoding.text_ids(row.given, row.where))
        except SoftPromptError as error:
            row.error = str(error)
    return texts


def _report(failed: Sequence[str], rows: Sequence[RequestRow], output: str, json: bool) -> None:
    say({"output": output, "rows": len(rows), "failed": len(failed)}, json, f"{len(rows)} rows written to {output}")
    if failed:
        raise SoftPromptError(
            f'{len(failed)} of {len(rows)} rows have no answer, and the reason as their "error" in {output}; '
            f"the first: {failed[0]}"
        )


def _read(
    input: str, task_column: str, prompts: SoftPrompts, shared: TaskTemplate | None, added: tuple[str, ...]
) -> list[RequestRow]:
    """The rows of the input, of which at least one can be answered."""
    rows = read_request_rows(input, prompts.tasks, added, task_column)
    for row in rows:
        task = row.task
        own = prompts.templates.get(task, TaskTemplate()) if task is not None else TaskTemplate()
        try:
            if not row.error:
                (shared or own).render_text(row.given, row.where)
        except SoftPromptError as error:
            row.error = str(error)
    if all(row.error for row in rows):
        raise SoftPromptError(rows[0].error)
    return rows


def _answer_file(
    load: Callable[[], tuple[Any, Any]],
    prompts: SoftPrompts,
    rows: Sequence[RequestRow],
    output: str,
    resume: bool,
    at_once: int,
    answer: Callable[[Any, Sequence[RequestRow]], list[dict[str, Any]]],
) -> list[str]:
    """Write each row with what `answer` adds to it, in the order of the rows.

    Returns:
        The errors of rows without an answer.
    """
    from lightning_softprompt.attachment.attach import attach, attachment_of
    from lightning_softprompt.attachment.summary import summary
    from lightning_softprompt.base.packed_linear import pack_linear_layers
    from lightning_softprompt.cli.output import progress_bar
    from lightning_softprompt.inference.generator import MixedTaskGenerator

    writer = RowWriter(Path(output), resume)  # an output that cannot be written is found before the work
    try:
        failed = _check_resumed(writer.written, rows, output)
        done = len(writer.written)
        if done == len(rows):
            return failed
        model, tokenizer = load()
        generator = MixedTaskGenerator(attach(model, prompts), tokenizer)
        pack_linear_layers(generator.model)
        attached = attachment_of(generator.model)
        assert attached is not None
        print(summary(attached, "auto"), file=sys.stderr)
        with progress_bar("answering", len(rows), done, "rows") as advance:
            while done < len(rows):
                part = rows[done : done + at_once]
                chosen = [row for row in part if not row.error]
                added = iter(answer(generator, chosen) if chosen else [])
                finished = [row.columns | ({"error": row.error} if row.error else next(added)) for row in part]
                writer.write(finished)
                failed += [row["error"] for row in finished if "error" in row]
                done += len(part)
                advance(len(part))
    finally:
        writer.close()
    return failed


def _check_resumed(written: Sequence[dict[str, Any]], rows: Sequence[RequestRow], output: str) -> list[str]:
    """The errors among the rows that an output holds already.

    Raises:
        SoftPromptError: an output of other rows than the input's.
    """
    for number, (old, row) in enumerate(zip(written, rows, strict=False), 1):
        own = {name: value for name, value in old.items() if name in row.columns}
        if dumps(own) != dumps(row.columns):  # as it was written: a date became text, and NaN null
            raise SoftPromptError(
                f"line {number} of {output} is another row than {row.where}, so it cannot be gone on with; give the "
                "input that it was made from, or another output"
            )
    if len(written) > len(rows):
        raise SoftPromptError(f"{output} holds {len(written)} rows and the input {len(rows)}; give another output")
    return [row["error"] for row in written if "error" in row]
