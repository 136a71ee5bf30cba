"""Whether the prompts of a run and its data speak of the same tasks, and what is said of both before the first step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt.data.datamodule import SPLITS, TaskDataModule
from lightning_softprompt.errors import SoftPromptError, nearest

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

logger = logging.getLogger("lightning_softprompt")

_MOST_NAMES = 20


def check_tasks(prompts: SoftPrompts, data: TaskDataModule, stage: str) -> None:
    """Compare the tasks of the prompts with those that have rows in the data of a stage.

    Of a streamed source whose rows name their tasks themselves it is not known which tasks come.

    Raises:
        SoftPromptError: a task has rows and no prompt.
    """
    missing: dict[str, str] = {}
    for split in SPLITS[stage]:
        for task in sorted(_known_tasks(data, split)):
            # A row to predict that has no prompt gets no answer, and the others do.
            if task not in prompts and split != "predict":
                missing.setdefault(task, split)
    if missing:
        hints = ((f"{task!r} ({split} rows)", nearest(task, prompts)) for task, split in missing.items())
        found = ", ".join(words for hint in hints for words in hint if words)
        raise SoftPromptError(
            f"the data have rows of tasks without a prompt: {found}; prompts: {_names(prompts)}. Give prompt and rows "
            "one name, add a prompt for the task, or leave its rows out"
        )
    if stage != "fit":
        return
    come = _known_tasks(data, "train")
    if data.streams and any(source.task is None for source in data.sources["train"]):
        come |= set(data.tasks)
    lonely = [task for task in prompts if task not in come and prompts[task].requires_grad]
    if lonely:
        rank_zero_only(logger.warning)(
            "no training row belongs to %s, whose prompts will stay as they are; tasks of the training rows: %s. If "
            "that is meant, prompts.freeze(task) keeps this warning away",
            _names(lonely),
            _names(sorted(come)),
        )


def check_targets(data: TaskDataModule) -> None:
    """Raise a `SoftPromptError` if a row that is to be trained or measured on has no target, or may have none."""
    for split, examples in data.examples.items():
        bare = next((example for example in examples if not example.target_ids), None)
        if split != "predict" and bare is not None:
            raise SoftPromptError(
                f"the {split} row {data.tokenizer.decode(bare.text_ids)!r:.200} of the task {bare.task!r} has no "
                "target; leave needs_targets=False out, so that such rows are found, or train with PromptDistillation"
            )
    if data.streams and not data.needs_targets:
        raise SoftPromptError(
            "streamed rows may have no target with needs_targets=False; leave it out, or train with PromptDistillation"
        )


def take_templates(prompts: SoftPrompts, data: TaskDataModule) -> None:
    """Give each prompt the template of its task in the data, so that it is saved with it. One that it has stays."""
    for task in prompts:
        if task not in data.tasks:
            continue
        if prompts.templates.setdefault(task, copy.deepcopy(data.tasks[task])) != data.tasks[task]:
            rank_zero_only(logger.warning)(
                "the prompt of %r has another template than the TaskDataModule, and keeps it when it is saved; "
                "del prompts.templates[%r] before the run takes that of the data",
                task,
                task,
            )


def _known_tasks(data: TaskDataModule, split: str) -> set[str]:
    if split == "train" and data.streams:
        return {source.task for source in data.sources["train"] if source.task is not None}
    return {example.task for example in data.examples.get(split, ())}


def _names(tasks: Iterable[str]) -> str:
    named = list(map(repr, tasks))
    more = [f"and {len(named) - _MOST_NAMES} more"] if len(named) > _MOST_NAMES else []
    return ", ".join(named[:_MOST_NAMES] + more) or "none"
