"""`PromptDistillation`: a long hard prompt, which every request pays for, becomes a short soft prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import AdamW

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.errors import SoftPromptError, nearest
from lightning_softprompt.inference.requests import attached_prompts, most_tokens
from lightning_softprompt.prompts.initializers import Tokens
from lightning_softprompt.training.lessons import Lessons
from lightning_softprompt.training.module import CausalLMModule, text_ids
from lightning_softprompt.training.teachers import Teacher


class PromptDistillation(CausalLMModule):
    """A frozen causal LM whose soft prompts learn to say what long hard prompts make it say. No labels are needed.

    Each task has a *teacher*, a hard prompt such as instructions with examples, or what the system says in a chat. The
    task's soft prompt, some tens of virtual tokens, is its student. Both answer the same rows, and the loss is the
    divergence of their next-token distributions, KL(teacher ‖ student), over the positions of the answer. A row that
    has no target gets the answer that its teacher writes; `TaskDataModule(needs_targets=False)` lets such rows in. The
    student is served with the rows' template alone.

    During a run the teachers are tasks of the same prompts. They never train, their keys and values are computed once,
    and no folder and no checkpoint holds them.

    Training logs `train/loss` and `train/loss/<task>`, the divergence in nats. Validation and test log, with `val` or
    `test` in place of `…`:

    - `…/divergence/<task>`, the mean over the tokens of answers, and `…/equal_first/<task>`, the share of rows in which
      student and teacher find the same first token likeliest;
    - `…/divergence` and `…/equal_first`, the means over tasks;
    - `…/divergence_micro` and `…/equal_first_micro`, the means over all tokens and over all rows.

    Prediction is that of `CausalLMModule`, by the student.

    Gist tokens (Mu et al. 2023, arXiv 2304.08467) train the model itself to compress prompts. Here it stays frozen, and
    the prompts of other tasks with it.

    Args:
        base: hub id or path of the causal LM.
        teachers: the hard prompt of each task. It stands in front of the task's texts; in a task with chats it is what
            the system says.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes the scheduler from the optimizer; it is stepped after every step of the optimizer. None
            means linear warm-up, then cosine decay to zero.
        warmup_fraction: the fraction of all steps that the warm-up takes; not used if `lr_scheduler` is given.
        max_new_tokens: the most tokens of an answer, of the teacher and in prediction.
        top_k: None compares whole distributions, for which the teacher reads each row in each epoch. A number keeps
            that many of the likeliest tokens for each position of an answer, and takes the others as one token: then
            the teacher reads each row once. Validation and test always compare whole distributions.

    Raises:
        SoftPromptError: no teachers, or a `top_k` below 1. Before the first step: a teacher of a task without a prompt
            or a template, a task with rows and without a teacher, a teacher that is not longer than its student or too
            long for the model, or a run without a `TaskDataModule` or prompts.

    Example:
        >>> from lightning_softprompt import PromptDistillation, SoftPromptCallback
        >>> module = PromptDistillation("base", teachers={"support": "You answer the customers of a bicycle shop. …"})
        >>> callback = SoftPromptCallback(tasks={"support": 32})  # the student, and its number of virtual tokens
    """

    _judged: ClassVar[Mapping[str, str]] = {"min": "divergence", "max": "equal_first"}
    _needs_targets: ClassVar[bool] = False

    def __init__(
        self,
        base: str,
        teachers: dict[str, str],
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=0.02, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_fraction: float = 0.1,
        max_new_tokens: int = 64,
        top_k: int | None = None,
    ) -> None:
        super().__init__(base, optimizer, lr_scheduler, warmup_fraction, max_new_tokens)
        if not isinstance(teachers, Mapping) or not teachers:
            raise SoftPromptError(f"teachers must map at least one task to its hard prompt, got {teachers!r}")
        if top_k is not None and top_k < 1:
            raise SoftPromptError(f"top_k must be at least 1, or None for the whole distribution, got {top_k!r}")
        self.teachers = dict(teachers)
        self.top_k = top_k
        self._lessons: Lessons | None = None

    def on_fit_start(self) -> None:
        """Put the teachers beside their students."""
        self._dismiss()  # a run that an exception ended leaves its own
        self.lessons()

    def on_validation_start(self) -> None:
        """Put the teachers beside their students, if they are not."""
        self.lessons()

    def on_test_start(self) -> None:
        """Put the teachers beside their students, if they are not."""
        self.lessons()

    def teardown(self, stage: str) -> None:
        """Take the teachers away."""
        self._dismiss()

    def lessons(self) -> Lessons:
        """What the teachers of the run say of rows. The teachers are put beside their students for it, if they are not.

        Raises:
            SoftPromptError: teachers that do not fit the run, as the class says.
        """
        if self._lessons is None:
            prompts, data = attached_prompts(self._lm), self.datamodule
            self._check_names()
            teachers = {task: Teacher.of(task, text, data.encodings[task]) for task, text in self.teachers.items()}
            for task, teacher in teachers.items():
                self._check_lengths(teacher, len(prompts[task]))
            for teacher in teachers.values():
                prompts.add(teacher.name, Tokens(teacher.ids), model=self._lm, teacher=True)
            self._lessons = Lessons(self._lm, data.tokenizer, teachers, data.encodings, self.max_new_tokens, self.top_k)
        return self._lessons

    def _dismiss(self) -> None:
        attachment = attachment_of(self._lm)
        if attachment is not None:
            for name in attachment.prompts.teachers:
                attachment.prompts.remove(name)
            attachment.prefixes.clear()
        self._lessons = None

    def _check_names(self) -> None:
        prompts, data = attached_prompts(self._lm), self.datamodule
        for known, what in ((prompts, "prompt"), (data.tasks, "template in the data")):
            for task in self.teachers:
                if task not in known:
                    hint = nearest(task, known, "give both one name")
                    raise SoftPromptError(f"there is a teacher of {task!r} and no {what} of that name; {hint}")
        for split, examples in data.examples.items():
            untaught = sorted({example.task for example in examples} - set(self.teachers))
            if untaught and split != "predict":
                raise SoftPromptError(
                    f"the {split} rows of {', '.join(map(repr, untaught))} have no teacher; give PromptDistillation "
                    "one for each task, or train these with CausalLMModule"
                )

    def _check_lengths(self, teacher: Teacher, length: int) -> None:
        before, after = len(teacher.ids), len(teacher.head) + length
        if before <= after:
            raise SoftPromptError(
                f"the teacher of {teacher.task!r} puts {before} tokens in front of a row, and its student {after}: "
                "nothing is saved; give the prompt fewer virtual tokens"
            )
        positions = most_tokens(self._lm)
        if positions is not None and before + self.max_new_tokens >= positions:
            raise SoftPromptError(
                f"the teacher of {teacher.task!r} has {before} tokens and max_new_tokens is {self.max_new_tokens}, and "
                f"the model has {positions} positions; shorten one of them, or take a base with more"
            )
        if self.top_k is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise SoftPromptError("top_k cannot be had where the base is sharded, as ranks would make other passes")
        if self.top_k is not None and self.top_k >= vocabulary_size(self._lm):
            raise SoftPromptError(
                f"top_k is {self.top_k}, and the model has {vocabulary_size(self._lm)} tokens; leave top_k out"
            )

    def _rows(self, batch: dict[str, Any]) -> list[Example]:
        """The rows of a batch, each with a target: its own, or its teacher's answer."""
        rows = []
        for index, task in enumerate(batch["tasks"]):
            labels = batch["labels"][index] if "labels" in batch else batch["input_ids"].new_empty(0)
            rows.append(Example(task, text_ids(batch, index), labels[labels != -100].tolist()))
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not all(row.target_ids for row in rows):
            raise SoftPromptError(
                "teachers write no answers where the base is sharded, as all ranks have to make the same passes; give "
                "every row a target, or use strategy='ddp'"
            )
        return self.lessons().with_answers(rows)

    def _row_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the divergence over each row's answer, and its tokens: float32 and int64 `[batch]`."""
        rows = self._rows(batch)
        taught = self.lessons().remembered(rows)
        return _by_row(taught.divergence(self.lessons().learned(rows)), rows)

    def _evaluate(self, batch: dict[str, Any], with_prompts: bool = True) -> None:
        rows = self._rows(batch)
        taught, student = self.lessons().taught(rows), self.lessons().learned(rows, with_prompts)
        summed, counts = _by_row(taught.divergence(student), rows)
        self.losses.update(batch["tasks"], summed / counts, counts)
        is_equal = (taught.first() == student.argmax(-1)).float()
        self.accuracies.update(batch["tasks"], is_equal[counts.cumsum(0) - counts])

    def _computed(self) -> dict[str, Tensor]:
        found = {**self.losses.scalars("divergence"), **self.accuracies.scalars("equal_first")}
        self.losses.reset()
        self.accuracies.reset()
        return found


def _by_row(values: Tensor, rows: list[Example]) -> tuple[Tensor, Tensor]:
    """The sum of the values of each row's positions, and their number."""
    counts = torch.tensor([len(row.target_ids) for row in rows], device=values.device)
    return torch.stack([part.sum() for part in values.split(counts.tolist())]), counts
