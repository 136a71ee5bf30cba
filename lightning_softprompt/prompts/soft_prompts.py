"""`SoftPrompts`: the named prompts of all tasks of one base model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.bank import PromptBank
from lightning_softprompt.prompts.checkpoint import read_checkpoint
from lightning_softprompt.prompts.folder import Entry, Saved, load_folder, save_folder
from lightning_softprompt.prompts.initializers import Initializer, InitializerContext, as_initializer, sources_first
from lightning_softprompt.prompts.task_names import check_task_name, parameter_name
from lightning_softprompt.prompts.templates import TaskTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftPrompts(PromptBank):
    """The prompts of any number of tasks: for each task name one trainable float32 matrix `[length, hidden]`.

    The order of the tasks only determines their indices (`task_ids`): files, checkpoints and optimizers find a prompt
    by its task's name. Prompts stay float32 when a module that holds them is cast (`model.bfloat16()`,
    `precision="bf16-true"`); they are cast when they are used.

    Args:
        hidden_size: width of a virtual token, the same as that of the input embedding's output.
        base: the base model that the prompts belong to; None if it is not known.

    Attributes:
        templates: how a task's rows become text and target, by task. A task without a template is served raw.

    Example:
        >>> import torch
        >>> prompts = SoftPrompts(hidden_size=4)
        >>> prompts.add("topic", torch.zeros(3, 4))
        >>> prompts.add("spam", torch.ones(2, 4))
        >>> prompts.tasks, prompts["topic"].shape
        (('topic', 'spam'), torch.Size([3, 4]))
        >>> prompts.task_ids(["spam", None])
        tensor([ 1, -1])
    """

    def __init__(self, hidden_size: int, base: BaseModel | None = None) -> None:
        super().__init__(hidden_size)
        self.base = base
        self.templates: dict[str, TaskTemplate] = {}
        self._starts: dict[str, str] = {}

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tasks: Mapping[str, str | int | Initializer],
        tokenizer: Any = None,
        seed: int = 0,
    ) -> SoftPrompts:
        """Make the prompts of `tasks` for `model`.

        Args:
            model: a Hugging Face causal LM.
            tasks: how each task's prompt starts; a str means `Text(...)`, an int means `Vocabulary(length)`.
            tokenizer: the model's tokenizer; only `Text` and `Labels` need it.
            seed: the seed of starts that are sampled.

        Raises:
            SoftPromptError: a task name, a start or a model that cannot be used.
        """
        if not isinstance(tasks, Mapping) or not tasks:
            raise SoftPromptError(f"tasks must map at least one task name to how its prompt starts, got {tasks!r}")
        base = BaseModel.of(model)
        prompts = cls(base.hidden_size, base)
        initializers = {check_task_name(task): as_initializer(task, initializer) for task, initializer in tasks.items()}
        for task in sources_first(initializers):
            prompts.add(task, initializers[task], model=model, tokenizer=tokenizer, seed=seed)
        prompts._name_tasks(initializers)
        return prompts

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SoftPrompts:
        """Load prompts that `save_pretrained` wrote. The files are checked completely before any prompt is made.

        Raises:
            SoftPromptError: a file that is missing, damaged, of another format, or does not fit the other file.
        """
        return cls._of(load_folder(Path(folder)))

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path | Mapping[str, Any]) -> SoftPrompts:
        """The prompts in a checkpoint of Lightning, with their templates. The base model is not needed.

        A checkpoint that 0.1 wrote has values and names alone: its tasks are in the order of their names.

        Args:
            checkpoint: the path of a file that `ModelCheckpoint` or `trainer.save_checkpoint` wrote, also one of
                weights alone; or its content, as `LightningModule.on_load_checkpoint` gets it.

        Raises:
            SoftPromptError: a file that is missing, damaged or no checkpoint, a folder, a checkpoint without prompts,
                or a prompt that is not finite.
        """
        saved, templates = read_checkpoint(checkpoint)
        prompts = cls._of(saved)
        prompts.templates.update(templates)
        return prompts

    @classmethod
    def _of(cls, saved: Saved) -> SoftPrompts:
        prompts = cls(saved.hidden_size, saved.base)
        for entry in saved.entries:
            prompts.add(entry.task, saved.tensors[entry.task])
            prompts._starts[entry.task] = entry.start
            prompts[entry.task].requires_grad_(not entry.frozen)
        return prompts

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all prompts into `folder`, as one safetensors and one JSON file. An earlier save is replaced whole."""
        entries = [
            Entry(task, len(self[task]), self._starts[task], not self[task].requires_grad) for task in self._tasks
        ]
        tensors = {task: self[task].detach().cpu().contiguous() for task in self._tasks}
        save_folder(Path(folder), Saved(self.hidden_size, self.base, entries, tensors))

    @property
    def starts(self) -> Mapping[str, str]:
        """How each task's prompt started, in words."""
        return self._starts

    def add(
        self,
        task: str,
        start: Tensor | str | int | Initializer,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        """Add a task.

        Args:
            task: any non-empty text without path separators and control characters.
            start: the prompt's first value, `[length, hidden]`, or how the prompt starts.
            model: the base model; needed unless `start` is a tensor.
            tokenizer: the base model's tokenizer; only `Text` and `Labels` need it.
            seed: the seed of a start that is sampled.
        """
        check_task_name(task)
        if task in self._indices:
            raise SoftPromptError(f"there is a task {task!r} already; remove it first or choose another name")
        if isinstance(start, Tensor):
            value, described = start, "a tensor"
        else:
            initializer = as_initializer(task, start)
            if model is None:
                raise SoftPromptError(f"task {task!r}: to start from {initializer.describe()}, pass model=…")
            known = {name: self[name] for name in self._tasks}
            value = initializer(InitializerContext(task, model, tokenizer, known, seed))
            described = initializer.describe()
        self._check_value(task, value)
        self._name_tasks([*self._tasks, task])
        self._starts[task] = described
        device = next((prompt.device for prompt in self.parameters()), value.device)
        self._put(task, nn.Parameter(value.detach().to(device, torch.float32, copy=True)))

    def update(self, other: SoftPrompts) -> None:
        """Copy the tasks of `other`: their prompts, how these started, and whether they are frozen.

        Raises:
            SoftPromptError: a task that is here already, prompts of another base model, or a prompt that is not finite;
                nothing is copied then.
        """
        twice = [task for task in other if task in self]
        if twice:
            raise SoftPromptError(
                f"both have a task {twice[0]!r}; remove it from one of them, or rename it: "
                f"prompts.rename({twice[0]!r}, other_name)"
            )
        if self.hidden_size != other.hidden_size or (self.base and other.base and not self.base.is_same(other.base)):
            names = [f"{(each.base and each.base.name) or 'without a name'}" for each in (self, other)]
            raise SoftPromptError(
                f"prompts of different base models cannot stand together: {names[0]} (width {self.hidden_size}) and "
                f"{names[1]} (width {other.hidden_size})"
            )
        for task in other:
            self._check_value(task, other[task])
        self.base = self.base or other.base
        for task in other:
            self.add(task, other[task].detach())
            self._starts[task] = other.starts[task]
            self[task].requires_grad_(other[task].requires_grad)
            if task in other.templates:
                self.templates[task] = copy.deepcopy(other.templates[task])

    def subset(self, tasks: Iterable[str]) -> SoftPrompts:
        """A copy of the prompts of these tasks, in this order, with their templates."""
        chosen = SoftPrompts(self.hidden_size, self.base)
        for task in [tasks] if isinstance(tasks, str) else tasks:
            chosen.add(task, self[task].detach())
            chosen._starts[task] = self._starts[task]
            chosen[task].requires_grad_(self[task].requires_grad)
            if task in self.templates:
                chosen.templates[task] = copy.deepcopy(self.templates[task])
        return chosen

    def rename(self, task: str, new: str) -> None:
        """Give a task another name. Its prompt, its index and its template stay what they are.

        Raises:
            SoftPromptError: an unknown task, or a name that cannot be used or is taken.
        """
        prompt = self[task]
        check_task_name(new)
        if new in self:
            raise SoftPromptError(f"there is a task {new!r} already; remove it first or choose another name")
        del self._parameters[parameter_name(task)]
        self._name_tasks([new if name == task else name for name in self._tasks])
        self._put(new, prompt)
        self._starts[new] = self._starts.pop(task)
        if task in self.templates:
            self.templates[new] = self.templates.pop(task)

    def remove(self, task: str) -> None:
        """Remove a task. The indices of the tasks behind it become smaller by one."""
        self._check_known(task)
        del self._parameters[parameter_name(task)], self._starts[task]
        self.templates.pop(task, None)
        self._name_tasks(name for name in self._tasks if name != task)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise a `SoftPromptError` unless there is at least one task and the prompts were made for `model`."""
        if not self._tasks:
            raise SoftPromptError("there is no task in these prompts; add one first")
        width = BaseModel.of(model).hidden_size
        if self.hidden_size != width:
            raise SoftPromptError(
                f"the prompts are {self.hidden_size} wide, the embeddings of {type(model).__name__} are {width}; "
                "these prompts were made for another base model"
            )
        if self.base is not None:
            self.base.check(model)

    def _check_value(self, task: str, value: Tensor) -> None:
        if value.ndim != 2 or value.shape[0] < 1 or value.shape[1] != self.hidden_size:
            raise SoftPromptError(
                f"the prompt of task {task!r} must be [length, {self.hidden_size}] with length at least 1, "
                f"got {list(value.shape)}"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
            raise SoftPromptError(f"the prompt of task {task!r} must hold finite floating-point numbers")
