"""The commands that inspect folders of prompts and change their tasks."""

from __future__ import annotations

import re
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.output import print_table, say
from lightning_softprompt.cli.terminal import printable
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.files import write_atomically, writing
from lightning_softprompt.prompts.index import INDEX_NAME
from lightning_softprompt.prompts.initializers import Initializer
from lightning_softprompt.prompts.soft_prompts import SoftPrompts


def inspect(
    prompts: str, base: str | None = None, nearest: int = 3, plot: str | None = None, json: bool = False
) -> None:
    """Show the tasks of a folder: lengths, norms, how alike they are, and the vocabulary's tokens nearest to them.

    A similarity near 1 means that a prompt's tokens have become one; so does a rank far below the length. Norm and
    similarity are means over the tokens; the closest task is the one whose mean token is most alike, with the cosine.

    Args:
        prompts: folder of prompts.
        base: hub id or path of the base model, to also show the vocabulary's tokens nearest to each virtual token.
        nearest: number of nearest tokens to show for each virtual token.
        plot: PNG file to write, with the norms of the virtual tokens and how alike the tasks are.
        json: print JSON in place of tables.
    """
    from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
    from lightning_softprompt.prompts.inspection import CAVEAT, draw, nearest_tokens
    from lightning_softprompt.prompts.statistics import prompt_statistics

    known = SoftPrompts.from_pretrained(prompts)
    rows: list[dict[str, Any]] = [asdict(each) for each in prompt_statistics(known)]
    near = {} if base is None else nearest_tokens(known, load_causal_lm(base), load_tokenizer(base), nearest)
    if plot is not None:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        figure = BytesIO()
        draw(known).savefig(figure, dpi=120, format="png")
        write_atomically(Path(plot), figure.getvalue())
    if json:
        for row in rows if near else ():
            row["nearest_tokens"] = [[asdict(each) for each in tokens] for tokens in near[row["task"]]]
        say({"base": known.base.name if known.base else None, "hidden_size": known.hidden_size, "tasks": rows}, True)
        return
    print(printable(f"{prompts}: {len(known)} tasks, width {known.hidden_size}"))
    print_table("", [_in_short(row) for row in rows])
    for row in rows:
        print(printable(f"{row['task']} started from {_start_in_words(row['start'])}"))
    for task, by_token in near.items():
        lines = [
            {"token": number, "nearest": ", ".join(f"{each.token!r} {each.cosine:.2f}" for each in tokens)}
            for number, tokens in enumerate(by_token)
        ]
        print_table(f"nearest tokens of {task!r}", lines)
    if near:
        print(CAVEAT)
    if plot is not None:
        print(printable(f"figure written to {plot}"))


def _start_in_words(start: str) -> str:
    """How a prompt started, as it is saved: of a text or of tokens in words."""
    found = re.fullmatch(r"T(ext|okens)\((?:text|ids)=(.*?)(?:, length=(None|\d+))?\)", start, re.DOTALL)
    if found is None:
        return start
    length = f", cut or repeated to {found[3]} tokens" if (found[3] or "None") != "None" else ""
    return f"the t{found[1]} {found[2]}{length}"


def _in_short(row: dict[str, Any]) -> dict[str, Any]:
    """What `inspect` shows of a task in a table that fits a terminal of 80 columns."""
    closest = f"{row['closest_task']} {row['closest_cosine']:.2f}" if row["closest_task"] is not None else None
    return {
        "task": row["task"],
        "length": f"{row['length']}, frozen" if row["frozen"] else row["length"],
        "norm": row["token_norm"],
        "similarity": row["token_similarity"],
        "rank": row["effective_rank"],
        "closest": closest,
    }


def add_task(
    prompts: str, task: str, start: int | Initializer | str, base: str | None = None, seed: int = 0, json: bool = False
) -> None:
    """Add a task whose prompt is not trained yet to a folder of prompts.

    Args:
        prompts: folder of prompts; it is made if it does not exist.
        task: the task's name.
        start: a text, a number of tokens to sample from the vocabulary, or an initializer as in a config, for example
            {"class_path": "lightning_softprompt.Labels", "init_args": {"words": [" spam", " ham"], "length": 16}}.
        base: hub id or path of the base model; default: the base model that the prompts remember.
        seed: seed of a start that is sampled.
        json: print what was done as JSON.
    """
    from lightning_softprompt.base.fingerprint import BaseModel
    from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
    from lightning_softprompt.prompts.initializers import as_initializer

    known = of_folder(prompts)
    name = base or (known.base.name if known is not None and known.base else None)
    if not name:
        raise SoftPromptError("which base model do the prompts belong to? Give --base, a hub id or a path")
    # The base takes long to load, so other writers are kept out only afterwards, and the folder is read again.
    model, initializer = load_causal_lm(name), as_initializer(task, start)
    tokenizer = load_tokenizer(name) if initializer.needs_tokenizer else None
    with writing(Path(prompts)):
        known = of_folder(prompts)
        if known is None:
            of_base = BaseModel.of(model)
            known = SoftPrompts(of_base.hidden_size, of_base)
        elif known.base is not None:
            known.base.check(model)
        known.add(task, initializer, model=model, tokenizer=tokenizer, seed=seed)
        _save(known, prompts, json)


def remove_task(prompts: str, tasks: list[str], json: bool = False) -> None:
    """Remove tasks from a folder of prompts.

    Args:
        prompts: folder of prompts.
        tasks: names of the tasks.
        json: print what was done as JSON.
    """
    with writing(Path(prompts)):
        known = SoftPrompts.from_pretrained(Path(prompts))
        for task in tasks:
            known.remove(task)
        _save(known, prompts, json)


def rename_task(prompts: str, task: str, to: str, json: bool = False) -> None:
    """Give a task of a folder of prompts another name. Its prompt and its template stay what they are.

    Args:
        prompts: folder of prompts.
        task: the task's name.
        to: its new name.
        json: print what was done as JSON.
    """
    with writing(Path(prompts)):
        known = SoftPrompts.from_pretrained(Path(prompts))
        known.rename(task, to)
        _save(known, prompts, json)


def merge(folders: list[str], output: str, json: bool = False) -> None:
    """Put the tasks of several folders of prompts into one folder, which keeps the tasks that it holds already.

    Args:
        folders: folders of prompts, all of one base model; no task may be in two of them.
        output: folder of prompts; it is made if it does not exist.
        json: print what was done as JSON.
    """
    if not folders:
        raise SoftPromptError("there is nothing to merge; give --folders at least one folder of prompts")
    added = [SoftPrompts.from_pretrained(folder) for folder in folders]
    with writing(Path(output)):
        _save(joined(of_folder(output), *added), output, json)


def extract(checkpoint: str, output: str, json: bool = False) -> None:
    """Write the prompts of a run's checkpoint into a folder, with their templates. The base model is not needed.

    Args:
        checkpoint: a file that a run of fit, ModelCheckpoint or trainer.save_checkpoint wrote.
        output: folder of prompts; an earlier save in it is replaced whole.
        json: print what was done as JSON.
    """
    _save(SoftPrompts.from_checkpoint(checkpoint), output, json)


def import_peft(adapters: list[str], output: str, task: str | None = None, json: bool = False) -> None:
    """Read adapters of PEFT's prompt tuning into a folder of prompts, which keeps the tasks that it holds already.

    An adapter that names another base model than the one that the folder's prompts remember is refused.

    Args:
        adapters: folders, each with an adapter_config.json.
        output: folder of prompts; it is made if it does not exist.
        task: name of the task, if there is only one adapter; default: the name from which export-peft wrote the
            adapter, else the name of the adapter's folder.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.peft import import_peft as read

    if task is not None and len(adapters) > 1:
        raise SoftPromptError(f"one task name for {len(adapters)} adapters; leave --task out, or import one by one")
    if not adapters:
        raise SoftPromptError("there is nothing to import; give --adapters at least one folder of an adapter")
    with writing(Path(output)):
        known = of_folder(output)
        base = known.base if known is not None else None
        _save(joined(known, *(read(adapter, task, base) for adapter in adapters)), output, json)


def export_peft(
    prompts: str, output: str, tasks: list[str] | None = None, base: str | None = None, json: bool = False
) -> None:
    """Write prompts as adapters that PEFT loads, each in a folder that is named after its task.

    Args:
        prompts: folder of trained prompts.
        output: folder to write the adapters' folders into.
        tasks: names of the tasks; default: all tasks.
        base: hub id or path of the base model for the adapters' configs; default: the one that the prompts remember.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.peft import export_peft as write

    known = SoftPrompts.from_pretrained(prompts)
    chosen = list(known.tasks) if tasks is None else tasks
    write(known, chosen, output, base)
    folders = {task: str(Path(output) / task) for task in chosen}
    say({"adapters": folders}, json, "\n".join(folders.values()))


def of_folder(folder: str) -> SoftPrompts | None:
    """The prompts that a folder holds; None if it holds none."""
    return SoftPrompts.from_pretrained(Path(folder)) if (Path(folder) / INDEX_NAME).is_file() else None


def joined(known: SoftPrompts | None, *added: SoftPrompts) -> SoftPrompts:
    """All these prompts in one bank, the known ones in front."""
    first, *others = added if known is None else (known, *added)
    for prompts in others:
        first.update(prompts)
    return first


def _save(prompts: SoftPrompts, folder: str, json: bool) -> None:
    prompts.save_pretrained(folder)
    tasks = ", ".join(prompts.tasks) or "no task"
    say({"prompts": folder, "tasks": list(prompts.tasks)}, json, f"{folder} holds {tasks}")
