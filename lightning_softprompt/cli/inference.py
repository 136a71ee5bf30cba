"""The commands that answer the rows of a file: `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.output import RowWriter, say
from lightning_softprompt.cli.request_rows import RequestRow, read_request_rows
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.templates import TaskTemplate


def generate(
    base: str,
    prompts: str,
    input: str,
    output: str,
    template: str = "{text}",
    max_new_tokens: int = 64,
    max_batch_tokens: int = 16_384,
    chat: bool = False,
    system: str | None = None,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Answer the rows of a JSONL file, many tasks in one batch.

    Answers are written as they come. A row that cannot be answered stops no other one: it is written with an `error` in
    place of its `output`, and the exit status is 1.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` leaves it.
        input: JSONL file; each row has a `task` (null: no prompt) and the columns of the template.
        output: JSONL file to write: the rows, each with its `output` or `error`.
        template: the model's input; {column} stands for a column of the row. Use that of the training.
        max_new_tokens: most tokens of an answer.
        max_batch_tokens: most tokens of a batch, prompts, texts and answers together; what fits the memory.
        chat: put the text into the tokenizer's chat template, for tasks that were trained with `chat`.
        system: what the system says in that chat.
        resume: go on behind the rows that the output holds already, as after an interruption.
        json: print what was done as JSON.
    """
    shared = TaskTemplate(template, chat=chat, system=system)
    rows = _read(input, prompts, shared)

    def answer(generator: Any, chosen: Sequence[RequestRow]) -> list[dict[str, Any]]:
        from lightning_softprompt.base.tokens import encode_chat

        texts: list[Any] = [shared.render_text(row.columns, row.where) for row in chosen]
        if chat:
            texts = [encode_chat(generator.tokenizer, text, system) for text in texts]
        tasks = [row.columns["task"] for row in chosen]
        answers = generator.generate(texts, tasks, max_new_tokens, max_batch_tokens)
        return [
            {"error": f"{row.where}: {answers.failures[index]}"} if text is None else {"output": text}
            for index, (row, text) in enumerate(zip(chosen, answers, strict=True))
        ]

    at_once = max(1, 4 * max_batch_tokens // (max_new_tokens + 64))  # some batches, so that lengths can be sorted
    failed = _answer_file(base, prompts, rows, output, resume, at_once, answer)
    say({"output": output, "rows": len(rows), "failed": len(failed)}, json, f"{len(rows)} rows written to {output}")
    if failed:
        raise SoftPromptError(
            f'{len(failed)} of {len(rows)} rows have no answer, and the reason as their "error" in {output}; '
            f"the first: {failed[0]}"
        )


def _read(input: str, prompts: str, template: TaskTemplate) -> list[RequestRow]:
    """The rows of the input, of which at least one can be answered."""
    rows = read_request_rows(input, SoftPrompts.from_pretrained(prompts).tasks, ("output", "error"))
    for row in rows:
        try:
            if row.columns:
                template.render_text(row.columns, row.where)
        except SoftPromptError as error:
            row.error = str(error)
    if all(row.error for row in rows):
        raise SoftPromptError(rows[0].error)
    return rows


def _answer_file(
    base: str,
    prompts: str,
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
    from lightning_softprompt.cli.output import progress_bar
    from lightning_softprompt.inference.generator import MixedTaskGenerator

    writer = RowWriter(Path(output), resume)  # an output that cannot be written is found before the work
    try:
        failed = _check_resumed(writer.written, rows, output)
        done = len(writer.written)
        if done == len(rows):
            return failed
        generator = MixedTaskGenerator.from_pretrained(base, prompts)
        with progress_bar("answering", len(rows), done) as advance:
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
        if {name: value for name, value in old.items() if name in row.columns} != row.columns:
            raise SoftPromptError(
                f"line {number} of {output} is another row than {row.where}, so it cannot be gone on with; give the "
                "input that it was made from, or another output"
            )
    if len(written) > len(rows):
        raise SoftPromptError(f"{output} holds {len(written)} rows and the input {len(rows)}; give another output")
    return [row["error"] for row in written if "error" in row]
