"""The commands beside those of the Trainer: what is done with folders of prompts."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.folder import INDEX_NAME, write_rows
from lightning_softprompt.prompts.initializers import Init
from lightning_softprompt.prompts.soft_prompts import SoftPrompts


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

    A row that cannot be answered stops no other one: it is written with an `error` in place of its `output`, and the
    exit status is 1.

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
        json: print what was done as JSON.
    """
    from lightning_softprompt.base.tokens import encode_chat
    from lightning_softprompt.inference.generator import MixedTaskGenerator

    places, rows, texts, errors = _read_requests(input, prompts, template)
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
            errors[index] = f"{places[index]}: {generator.failures[request]}"
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


def inspect(
    prompts: str, base: str | None = None, nearest: int = 3, plot: str | None = None, json: bool = False
) -> None:
    """Show the tasks of a folder: lengths, norms, likeness, and the vocabulary's tokens next to them.

    Similarity near 1 says that a prompt's tokens have become one; so does an effective rank far below the length.

    Args:
        prompts: folder of prompts.
        base: hub id or path of the base model, to also show the vocabulary's tokens nearest to each virtual token.
        nearest: how many of these.
        plot: PNG file to write: norms of the tokens, and how alike the tasks are.
        json: print JSON in place of tables.
    """
    from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
    from lightning_softprompt.prompts.inspection import CAVEAT, draw, facts, nearest_tokens

    known = SoftPrompts.from_pretrained(prompts)
    rows: list[dict[str, Any]] = [asdict(each) for each in facts(known)]
    near = {}
    if base is not None:
        found = nearest_tokens(known, load_causal_lm(base), load_tokenizer(base), nearest)
        near = {
            task: [tokens[at : at + nearest] for at in range(0, len(tokens), nearest)] for task, tokens in found.items()
        }
    if plot is not None:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        draw(known).savefig(plot, dpi=120, format="png")
    if json:
        for row in rows if near else ():
            row["nearest_tokens"] = [[asdict(each) for each in tokens] for tokens in near[row["task"]]]
        say({"base": known.base.name if known.base else None, "hidden_size": known.hidden_size, "tasks": rows}, True)
        return
    _print_table(f"{prompts}: {len(known)} tasks, width {known.hidden_size}", rows)
    for task, by_token in near.items():
        lines = [
            {"token": place, "nearest": ", ".join(f"{each.token!r} {each.cosine:.2f}" for each in tokens)}
            for place, tokens in enumerate(by_token)
        ]
        _print_table(f"nearest tokens of {task!r}", lines)
    if near:
        print(CAVEAT)
    if plot is not None:
        print(f"figure written to {plot}")


def add_task(
    prompts: str, task: str, start: int | Init | str, base: str | None = None, seed: int = 0, json: bool = False
) -> None:
    """Add a task to a folder of prompts, not trained yet.

    Args:
        prompts: folder of prompts; made where there is none.
        task: the task's name.
        start: a text, a number of tokens to draw from the vocabulary, or an initialiser as in a config, for example
            {"class_path": "lightning_softprompt.Labels", "init_args": {"words": [" spam", " ham"], "length": 16}}.
        base: hub id or path of the base model; default: as the prompts know it.
        seed: what a drawn start is drawn from.
        json: print what was done as JSON.
    """
    from lightning_softprompt.base.fingerprint import BaseModel
    from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
    from lightning_softprompt.prompts.initializers import as_init

    known = _of_folder(prompts)
    name = base or (known.base.name if known is not None and known.base else None)
    if not name:
        raise SoftPromptError("which base model do the prompts belong to? Give --base, a hub id or a path")
    model, init = load_causal_lm(name), as_init(task, start)
    if known is None:
        of_base = BaseModel.of(model)
        known = SoftPrompts(of_base.hidden_size, of_base)
    elif known.base is not None:
        known.base.check(model)
    known.add(task, init, model=model, tokenizer=load_tokenizer(name) if init.needs_tokenizer else None, seed=seed)
    _save(known, prompts, json)


def remove_task(prompts: str, tasks: list[str], json: bool = False) -> None:
    """Take tasks out of a folder of prompts.

    Args:
        prompts: folder of prompts.
        tasks: their names.
        json: print what was done as JSON.
    """
    known = SoftPrompts.from_pretrained(prompts)
    for task in tasks:
        known.remove(task)
    _save(known, prompts, json)


def merge(folders: list[str], output: str, json: bool = False) -> None:
    """Put the tasks of several folders of prompts into one; those that it holds already are kept.

    Args:
        folders: of prompts, all of one base model, no task twice.
        output: folder of prompts; made where there is none.
        json: print what was done as JSON.
    """
    if not folders:
        raise SoftPromptError("there is nothing to merge; give --folders at least one folder of prompts")
    _add_to_folder(output, [SoftPrompts.from_pretrained(folder) for folder in folders], json)


def import_peft(adapters: list[str], output: str, task: str | None = None, json: bool = False) -> None:
    """Read adapters of PEFT's prompt tuning into a folder of prompts; those that it holds already are kept.

    Args:
        adapters: folders, each with an adapter_config.json.
        output: folder of prompts; made where there is none.
        task: what to call the task, where there is one adapter; default: the name of the adapter's folder.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.peft import import_peft as read

    if task is not None and len(adapters) > 1:
        raise SoftPromptError(f"one task name for {len(adapters)} adapters; leave --task out, or import one by one")
    _add_to_folder(output, [read(adapter, task) for adapter in adapters], json)


def export_peft(
    prompts: str, output: str, tasks: list[str] | None = None, base: str | None = None, json: bool = False
) -> None:
    """Write prompts as adapters that PEFT loads, each in a folder of its task's name.

    Args:
        prompts: folder of trained prompts.
        output: folder to write the adapters' folders into.
        tasks: which ones; default: all.
        base: id or path of the base model, told in the adapters; default: as the prompts know it.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.peft import export_peft as write

    known = SoftPrompts.from_pretrained(prompts)
    chosen = list(known.tasks) if tasks is None else tasks
    write(known, chosen, output, base)
    folders = {task: str(Path(output) / task) for task in chosen}
    say({"adapters": folders}, json, "\n".join(folders.values()))


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "inspect": inspect,
    "add-task": add_task,
    "remove-task": remove_task,
    "merge": merge,
    "import-peft": import_peft,
    "export-peft": export_peft,
}


def _read_requests(
    input: str, prompts: str, template: str
) -> tuple[list[str], list[dict[str, Any]], dict[int, str], dict[int, str]]:
    """Where each row stands, the rows, and by their index the texts of those that fit the template, and what else."""
    from lightning_softprompt.data.sources import Source
    from lightning_softprompt.prompts.templates import TaskTemplate

    places: list[str] = []
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
        places.append(where)
        rows.append({name: value for name, value in row.items() if name not in ("output", "error")})
    return places, rows, texts, errors


def _of_folder(folder: str) -> SoftPrompts | None:
    return SoftPrompts.from_pretrained(folder) if (Path(folder) / INDEX_NAME).is_file() else None


def _add_to_folder(folder: str, added: list[SoftPrompts], json: bool) -> None:
    known = _of_folder(folder)
    first, *others = added if known is None else [known, *added]
    for prompts in others:
        first.update(prompts)
    _save(first, folder, json)


def _save(prompts: SoftPrompts, folder: str, json: bool) -> None:
    prompts.save_pretrained(folder)
    tasks = ", ".join(prompts.tasks) or "no task"
    say({"prompts": folder, "tasks": list(prompts.tasks)}, json, f"{folder} holds {tasks}")


def say(done: dict[str, Any], json: bool, text: str = "", file: TextIO | None = None) -> None:
    """Print what a command did, as JSON or in words; what is no number is null in JSON."""
    print(json_format.dumps(_strict(done), ensure_ascii=False, allow_nan=False) if json else text, file=file)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table, markup=False)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
