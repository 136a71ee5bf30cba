"""The command `generate`, which answers the rows of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_softprompt.cli.output import say, write_rows
from lightning_softprompt.data.sources import Source
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
    json: bool = False,
) -> None:
    """Answer the rows of a JSONL file, many tasks in one batch.

    A row that cannot be answered does not stop the others. It is written with an `error` in place of its `output`, and
    the exit status is 1. If no row fits the template, nothing is written.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` writes it.
        input: JSONL file; each row has a `task` (null means no prompt) and the columns of the template.
        output: JSONL file to write: the rows, each with its `output` or `error`.
        template: the model's input; {column} stands for a column of the row. Use the template of the training.
        max_new_tokens: most tokens of an answer.
        max_batch_tokens: most tokens of a batch, prompts, texts and answers together; as many as fit into memory.
        chat: put the text into the tokenizer's chat template, for tasks that were trained with `chat`.
        system: what the system says in that chat.
        json: print what was done as JSON.
    """
    from lightning_softprompt.base.tokens import encode_chat
    from lightning_softprompt.inference.generator import MixedTaskGenerator

    locations, rows, texts, errors = _read_requests(input, prompts, template)
    if not texts:
        raise SoftPromptError(errors[0])
    generator = MixedTaskGenerator.from_pretrained(base, prompts)
    tasks = [rows[index]["task"] for index in texts]
    budgets = {"max_new_tokens": max_new_tokens, "max_batch_tokens": max_batch_tokens}
    inputs: list[Any] = list(texts.values())
    if chat:
        inputs = [encode_chat(generator.tokenizer, text, system) for text in inputs]
    answers = generator.generate(inputs, tasks, show_progress=True, **budgets)
    for request, (index, answer) in enumerate(zip(texts, answers, strict=True)):
        if answer is None:
            errors[index] = f"{locations[index]}: {generator.failures[request]}"
        else:
            rows[index]["output"] = answer
    for index, reason in errors.items():
        rows[index]["error"] = reason
    write_rows(Path(output), rows)
    say({"output": output, "rows": len(rows), "failed": len(errors)}, json, f"{len(rows)} rows written to {output}")
    if errors:
        raise SoftPromptError(
            f'{len(errors)} of {len(rows)} rows have no answer, and the reason as their "error" in {output}; '
            f"the first: {errors[min(errors)]}"
        )


def _read_requests(
    input: str, prompts: str, template: str
) -> tuple[list[str], list[dict[str, Any]], dict[int, str], dict[int, str]]:
    """Read the rows of the input file and render their texts.

    Returns:
        The place of each row in the file; the rows; the texts of the rows that fit the template, by index; and for the
        other rows why they do not fit, by index.

    Raises:
        SoftPromptError: a row without the column `task`.
    """
    locations: list[str] = []
    rows: list[dict[str, Any]] = []
    texts: dict[int, str] = {}
    errors: dict[int, str] = {}
    for index, (where, row) in enumerate(Source(input).rows("input")):
        if "task" not in row:
            known = SoftPrompts.from_pretrained(prompts).tasks
            raise SoftPromptError(f"{where}: there is no task; known tasks: {', '.join(map(repr, known))}")
        try:
            texts[index] = TaskTemplate(template).render_text(row, where)
        except SoftPromptError as error:
            errors[index] = str(error)
        locations.append(where)
        rows.append({name: value for name, value in row.items() if name not in ("output", "error")})
    return locations, rows, texts, errors
