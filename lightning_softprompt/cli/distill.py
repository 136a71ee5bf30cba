"""The command `distill`: a long hard prompt becomes a short soft prompt in a folder."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.folders import joined, of_folder
from lightning_softprompt.cli.output import print_table, progress_bar, say
from lightning_softprompt.cli.terminal import quiet_loggers
from lightning_softprompt.errors import SoftPromptError, check_at_least_one
from lightning_softprompt.prompts.files import check_writable, writing
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import TaskTemplate

_MOST_HELD_OUT = 100


def distill(
    base: str,
    teacher: str,
    texts: str,
    task: str,
    length: int = 32,
    output: str = "prompts",
    text: str = "{text}",
    target: str | None = None,
    labels: list[str] | None = None,
    chat: bool = False,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 0.02,
    max_new_tokens: int = 64,
    max_length: int = 512,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Teach some virtual tokens what a long hard prompt makes a model say. Texts are enough, no labels are needed.

    Answers come from the model itself with the hard prompt in front. A tenth of the texts is held out, and the command
    ends with a table of how near the soft prompt comes to the hard one on them, and what it saves.

    Args:
        base: hub id or path of the base model.
        teacher: file of the hard prompt. It stands in front of each text as it is; with `chat`, it is what the system
            says.
        texts: file of texts like those of requests, JSONL, CSV or Parquet, with the columns of `text`.
        task: name of the soft prompt.
        length: number of virtual tokens.
        output: folder of prompts, which keeps the tasks that it holds already; it is made if it does not exist.
        text: a request; {column} stands for a column of the file.
        target: the answer of a row that brings its own; {column} stands for a column, by default {label}. To rows
            without that column the model answers with the hard prompt.
        labels: the possible answers of a classification; default: answers are free text.
        chat: put texts into the tokenizer's chat template, in which the system then says nothing, if it lets it.
        steps: number of steps.
        batch_size: number of texts in a step.
        learning_rate: of AdamW, warmed up over a tenth of the steps, then decayed to zero.
        max_new_tokens: most tokens of an answer.
        max_length: most tokens of a text and its answer, without the hard prompt; longer texts lose their end.
        seed: seed of the order of texts, and of which are held out.
        json: print what was done as JSON.
    """
    check_task_name(task)
    check_at_least_one(steps=steps)
    if task in (of_folder(output) or ()):
        raise SoftPromptError(
            f"{output} holds a task {task!r} already; remove it first, or give another name or folder"
        )
    hard = _read(teacher, chat)
    check_writable(Path(output))
    template = TaskTemplate(text, target or ("{label}" if chat else " {label}"), labels, chat)
    with redirect_stdout(sys.stderr), quiet_loggers():  # Lightning draws on it
        data = _data(base, texts, task, template, batch_size, max_length, seed)
        module = _module(base, task, hard, learning_rate, max_new_tokens)
        callback = _student(data.tokenizer, task, hard, length)
        trainer = _trainer(callback, task, steps, output)
        try:
            with ExitStack() as bars:
                trainer.callbacks.append(_bars(bars, steps))
                trainer.fit(module, data)
        except BaseException as error:  # signals, too
            _leave_early(trainer, callback.prompts, task, output, error)
            raise
        _save(callback.prompts, task, output)
        (found,) = beside_teachers(module)
    if not json:
        print_fidelity([found])
    words = _in_words(found, base, length, output)
    say({"prompts": output, "steps": trainer.global_step, **found}, json, words)


def beside_teachers(module: Any, with_bar: bool = True) -> list[dict[str, Any]]:
    """How near the students of a `PromptDistillation` are to their teachers behind a run, on its validation rows.

    Of each task the first hundred rows are taken; a task without any is left out. See `Fidelity` for what is in a row.
    """
    from lightning_softprompt.training.fidelity import measure_fidelity, rows_to_read

    lessons, examples = module.lessons(), module.datamodule.examples.get("validation", [])
    rows = {task: [example for example in examples if example.task == task] for task in lessons.teachers}
    rows = {task: of_task[:_MOST_HELD_OUT] for task, of_task in rows.items() if of_task}
    count = sum(map(rows_to_read, rows.values()))
    bar = progress_bar("beside the hard prompt", count, 0, "rows") if with_bar else nullcontext(lambda count: None)
    with bar as advance:
        return [
            asdict(measure_fidelity(module.model, lessons, task, of_task, advance)) for task, of_task in rows.items()
        ]


def print_fidelity(rows: list[dict[str, Any]]) -> None:
    """Print what `beside_teachers` found, a table for each task."""
    for row in rows:
        measured = {
            "tokens in front of a text": (None, row["tokens_before"], row["tokens_after"]),
            "seconds a request": (None, row["seconds_before"], row["seconds_after"]),
            "divergence from the hard prompt, nats": (row["divergence_without"], None, row["divergence"]),
            "equal first tokens, %": (None, None, row["equal_first"]),
            "equal answers, %": (None, None, row["equal_answers"]),
            "an answer": (None, row["answer_before"], row["answer_after"]),
        }
        columns = ("", "no prompt", "hard prompt", "soft prompt")
        lines = [dict(zip(columns, (name, *values), strict=True)) for name, values in measured.items()]
        text = " ".join(row["text"].split())
        print_table(f"{row['task']}: {row['rows']} held-out texts, of which one is {text!r}", lines)


def _data(base: str, texts: str, task: str, template: TaskTemplate, batch_size: int, max_length: int, seed: int) -> Any:
    """The texts as training rows, of which some are held out as validation rows."""
    from lightning_softprompt.base.loading import load_tokenizer
    from lightning_softprompt.data.datamodule import TaskDataModule
    from lightning_softprompt.data.sources import Source
    from lightning_softprompt.training.teachers import system_of_student

    tokenizer = load_tokenizer(base)
    if template.chat:
        template = replace(template, system=system_of_student(tokenizer))
    data = TaskDataModule(
        tokenizer,
        {task: template},
        train=Source(texts, task=task),
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        needs_targets=False,
    )
    data.setup("fit")
    rows = data.examples["train"]
    if len(rows) < 2:
        raise SoftPromptError(f"{texts} has one text; give some more, as a tenth of them is held out")
    random.Random(seed).shuffle(rows)
    count = max(1, min(_MOST_HELD_OUT, len(rows) // 10))
    data.examples = {"train": rows[count:], "validation": rows[:count]}
    return data


def _module(base: str, task: str, hard: str, learning_rate: float, max_new_tokens: int) -> Any:
    from torch.optim import AdamW

    from lightning_softprompt.training.distillation import PromptDistillation

    optimizer = partial(AdamW, lr=learning_rate, weight_decay=0.0)
    return PromptDistillation(base, {task: hard}, optimizer, max_new_tokens=max_new_tokens)


def _student(tokenizer: Any, task: str, hard: str, length: int) -> Any:
    """The callback with the student, which starts as the end of the hard prompt: that says how to go on with a text."""
    from lightning_softprompt.base.tokens import encode_target
    from lightning_softprompt.prompts.initializers import Tokens
    from lightning_softprompt.training.callback import SoftPromptCallback

    ids = encode_target(tokenizer, hard)
    if not 0 < length < len(ids):
        raise SoftPromptError(f"the teacher has {len(ids)} tokens and length is {length}; give a length between")
    # By its ids: how a prompt started is saved in words, and the hard prompt is not to be.
    return SoftPromptCallback({task: Tokens(ids[-length:])})


def _trainer(callback: Any, task: str, steps: int, output: str) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    from lightning_softprompt.gradients import CollapseGuard, PromptGradientClipping

    # What the folder would not take at the end is found before the first step.
    first = LambdaCallback(on_train_start=lambda *_: _joined(callback.prompts, task, output))
    return Trainer(
        max_steps=steps,
        max_epochs=steps,  # as many as there can be, on however many devices
        callbacks=[callback, first, PromptGradientClipping(), CollapseGuard()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # Lightning's counts to the end of an epoch
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def _bars(bars: ExitStack, steps: int) -> Any:
    """A callback that shows how far a run is: the answers of the teacher, then the steps. The bars end with `bars`."""
    from lightning.pytorch import Callback

    class Bars(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            data, lessons = trainer.datamodule, pl_module.lessons()
            rows, at_once = data.examples["train"], data.batch_size
            # Where no step will read all rows, or each device its own, a step has the answers of its rows written.
            if trainer.world_size == 1 and len(rows) <= steps * at_once:
                with progress_bar("answers of the hard prompt", len(rows), 0, "rows") as advance:
                    for start in range(0, len(rows), at_once):
                        advance(len(lessons.with_answers(rows[start : start + at_once])))
            if trainer.is_global_zero:
                self.advance = bars.enter_context(progress_bar("training", steps, 0, "steps"))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            if trainer.is_global_zero:
                self.advance(1, f"training, loss {float(outputs['loss']):.3f}")

    return Bars()


def _read(path: str, chat: bool) -> str:
    """The hard prompt in a file. What the system says in a chat has no space around it."""
    try:
        found = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SoftPromptError(f"the teacher {path} does not exist; looked in {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise SoftPromptError(f"the teacher {path} is no text in UTF-8 ({error}); save it as one") from error
    if not found.strip():
        raise SoftPromptError(f"the teacher {path} is empty; write the hard prompt into it")
    return found.strip() if chat else found


def _save(prompts: SoftPrompts, task: str, output: str) -> None:
    """Put the task into the folder, beside those that it holds."""
    with writing(Path(output)):
        _joined(prompts, task, output).save_pretrained(output)


def _joined(prompts: SoftPrompts | None, task: str, output: str) -> SoftPrompts:
    """The task beside those that the folder holds."""
    assert prompts is not None
    return joined(of_folder(output), prompts.subset([task]))


def _in_words(found: dict[str, Any], base: str, length: int, output: str) -> str:
    """What was made, and the command that serves it."""
    from lightning_softprompt.cli.outcome import how_to_serve

    around = found["tokens_after"] - length
    words = f"{output} holds {found['task']}: {found['tokens_before']} tokens became {found['tokens_after']}"
    words += f", {length} virtual ones and {around} that the chat template writes" if around else ""
    return words + how_to_serve(base, output, checkpoint=None)


def _leave_early(trainer: Any, prompts: SoftPrompts | None, task: str, output: str, error: BaseException) -> None:
    """Keep what a run has learned that something ends, and exit as a signal wants it."""
    from lightning_softprompt.cli.outcome import exit_status

    if trainer.global_step > 0 and prompts is not None:
        _save(prompts, task, output)
        print(f"{output} holds {task} as it was after {trainer.global_step} steps", file=sys.stderr)
    status = exit_status(error)
    if status is not None:
        raise SystemExit(status) from error
