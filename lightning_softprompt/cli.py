"""The command `lightning-softprompt`: fit, validate, test, predict from a config, generate, and PEFT's folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace

from lightning_softprompt.attachment import SUBMODULE
from lightning_softprompt.callback import SoftPromptCallback
from lightning_softprompt.data import TaskDataModule
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients import PromptGradientClipping
from lightning_softprompt.storage import write_atomically

_USAGE = """usage: lightning-softprompt COMMAND [--help] [options]

Prompt tuning of a frozen causal LM, many tasks at once.

  fit, validate, test, predict   run a config: lightning-softprompt fit --config run.yaml
                                 (fit leaves the trained prompts in a folder whose name it prints)
  generate                       answer the rows of a JSONL file with trained prompts
  import-peft, export-peft       prompts from adapters of PEFT, and adapters from prompts

Every command explains itself with --help.
"""


class SoftPromptCLI(LightningCLI):
    """LightningCLI with the callback's arguments under `prompts`; each task's gradient is clipped, at 1 by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `prompts`."""
        parser.add_lightning_class_args(SoftPromptCallback, "prompts")

    def before_instantiate_classes(self) -> None:
        """Clip where the config says nothing about it."""
        trainer = self._get(self.config, "trainer")
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        clips = any(callback.class_path.endswith(f".{PromptGradientClipping.__name__}") for callback in callbacks)
        if trainer.gradient_clip_val is None and not clips:
            path = f"{PromptGradientClipping.__module__}.{PromptGradientClipping.__name__}"
            trainer.callbacks = [*callbacks, Namespace(class_path=path, init_args=Namespace())]

    def after_fit(self) -> None:
        """Leave the prompts, the best ones where a checkpoint callback monitors something, in a folder."""
        trainer: Any = self.trainer
        callback = next(c for c in trainer.callbacks if isinstance(c, SoftPromptCallback))
        assert callback.prompts is not None
        saving: Any = self.trainer.checkpoint_callback
        if saving is not None and saving.monitor and saving.best_model_path and self.trainer.is_global_zero:
            state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
            marker = f".{SUBMODULE}."
            callback.prompts.load_state_dict({k.split(marker)[1]: v for k, v in state.items() if marker in k})
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "prompts"
            callback.prompts.save_pretrained(folder)
            print(f"prompts saved in {folder}")

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write one JSON line a row, task and answer, to `predictions.jsonl`; an error where an answer is missing."""
        batches = self.trainer.predict(model, **kwargs) or []
        data: Any = self.datamodule
        answers = [answer for batch in batches for answer in batch]
        rows = [
            {"task": example.task, "answer": answer}
            for example, answer in zip(data.examples["predict"], answers, strict=True)
        ]
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_rows(path, rows)
        print(f"{len(rows)} predictions written to {path}")
        if None in answers:
            raise SoftPromptError(
                f"{answers.count(None)} of {len(rows)} rows have no answer, first row {answers.index(None) + 1}: "
                f"null in {path}; the reasons are logged above"
            )


def generate(
    base: str,
    prompts: str,
    input: str,
    output: str,
    template: str = "{text}",
    max_new_tokens: int = 64,
    max_batch_tokens: int = 16_384,
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
    """
    from lightning_softprompt.generation import MixedTaskGenerator

    places, rows, texts, errors = _read_requests(input, prompts, template)
    if not texts:
        raise SoftPromptError(errors[0])
    generator = MixedTaskGenerator.from_pretrained(base, prompts)
    tasks = [rows[index]["task"] for index in texts]
    budgets = {"max_new_tokens": max_new_tokens, "max_batch_tokens": max_batch_tokens}
    answers = generator.generate(list(texts.values()), tasks, show_progress=True, **budgets)
    for request, (index, answer) in enumerate(zip(texts, answers, strict=True)):
        if answer is None:
            errors[index] = f"{places[index]}: {generator.failures[request]}"
        else:
            rows[index]["output"] = answer
    for index, reason in errors.items():
        rows[index]["error"] = reason
    _write_rows(Path(output), rows)
    print(f"{len(rows)} rows written to {output}")
    if errors:
        raise SoftPromptError(
            f'{len(errors)} of {len(rows)} rows have no answer, and the reason as their "error" in {output}; '
            f"the first: {errors[min(errors)]}"
        )


def _read_requests(
    input: str, prompts: str, template: str
) -> tuple[list[str], list[dict[str, Any]], dict[int, str], dict[int, str]]:
    """Where each row stands, the rows, and by their index the texts of those that fit the template, and what else."""
    from lightning_softprompt.prompts import SoftPrompts
    from lightning_softprompt.sources import Source
    from lightning_softprompt.templates import TaskTemplate

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


def import_peft(adapters: list[str], output: str, task: str | None = None) -> None:
    """Read adapters of PEFT's prompt tuning into a folder of prompts; those that it holds already are kept.

    Args:
        adapters: folders, each with an adapter_config.json.
        output: folder of prompts; made where there is none.
        task: what to call the task, where there is one adapter; default: the name of the adapter's folder.
    """
    from lightning_softprompt.interop.peft import import_peft as read
    from lightning_softprompt.prompts import SoftPrompts
    from lightning_softprompt.storage import INDEX_NAME

    if task is not None and len(adapters) > 1:
        raise SoftPromptError(f"one task name for {len(adapters)} adapters; leave --task out, or import one by one")
    imported = [read(adapter, task) for adapter in adapters]
    prompts = SoftPrompts.from_pretrained(output) if (Path(output) / INDEX_NAME).is_file() else None
    if prompts is None:
        prompts = SoftPrompts(imported[0].hidden_size)
    for one in imported:
        for name in one.tasks:
            prompts.add(name, one[name].detach())
    prompts.save_pretrained(output)
    print(f"{sum(map(len, imported))} tasks from {len(adapters)} adapters; {output} holds: {', '.join(prompts.tasks)}")


def export_peft(prompts: str, output: str, tasks: list[str] | None = None, base: str | None = None) -> None:
    """Write prompts as adapters that PEFT loads, each in a folder of its task's name.

    Args:
        prompts: folder of trained prompts.
        output: folder to write the adapters' folders into.
        tasks: which ones; default: all.
        base: id or path of the base model, told in the adapters; default: as the prompts know it.
    """
    from lightning_softprompt.interop.peft import export_peft as write
    from lightning_softprompt.prompts import SoftPrompts

    known = SoftPrompts.from_pretrained(prompts)
    chosen = list(known.tasks) if tasks is None else tasks
    write(known, chosen, output, base)
    print("".join(f"{Path(output) / task}\n" for task in chosen), end="")


_COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "import-peft": import_peft,
    "export-peft": export_peft,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error of the user's ends with one line and exit status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    try:
        if arguments[0] in _COMMANDS:
            from jsonargparse import auto_cli

            name, rest = arguments[0], arguments[1:]
            auto_cli(_COMMANDS[name], args=rest, as_positional=False, prog=f"lightning-softprompt {name}")
        else:
            _run_trainer(arguments)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SoftPromptError):
            cause = cause.__cause__  # jsonargparse wraps what a class raises while it is made
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(1) from error


def _run_trainer(arguments: list[str]) -> None:
    from lightning_softprompt.module import CausalLMModule

    SoftPromptCLI(
        CausalLMModule,
        TaskDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-softprompt"},
        args=arguments,
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())


if __name__ == "__main__":
    main()
