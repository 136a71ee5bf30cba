"""`SoftPrompts`: the named prompts of all tasks of one base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.distributed import has_several_ranks, with_zero_gradients
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.folder import Entry, Saved, load_folder, save_folder
from lightning_softprompt.prompts.initializers import Initializer, InitializerContext, as_initializer, sources_first
from lightning_softprompt.prompts.task_names import check_task_name, parameter_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftPrompts(nn.Module):
    """The prompts of any number of tasks: for each task name one trainable float32 matrix `[length, hidden]`.

    The order of the tasks only determines their indices (`task_ids`): files, checkpoints and optimizers find a prompt
    by its task's name. Prompts stay float32 when a module that holds them is cast (`model.bfloat16()`,
    `precision="bf16-true"`); they are cast when they are used.

    Args:
        hidden_size: width of a virtual token, the same as that of the input embedding's output.
        base: the base model that the prompts belong to; None if it is not known.

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
        super().__init__()
        self.hidden_size = hidden_size
        self.base = base
        self._name_tasks([])
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
        saved = load_folder(Path(folder))
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
    def tasks(self) -> tuple[str, ...]:
        """The task names; the position of a task among them is its index."""
        return self._tasks

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of virtual tokens of each task, in the order of `tasks`."""
        return tuple(len(self[task]) for task in self._tasks)

    @property
    def starts(self) -> Mapping[str, str]:
        """How each task's prompt started, in words."""
        return self._starts

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self._indices

    def __getitem__(self, task: str) -> nn.Parameter:
        self._check_known(task)
        parameter = self._parameters[parameter_name(task)]
        assert isinstance(parameter, nn.Parameter)
        return parameter

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
        self.register_parameter(parameter_name(task), nn.Parameter(value.detach().to(device, torch.float32, copy=True)))
        # PyTorch's optimizers save their state by position. Sorted by name, each position always belongs to one task.
        self._parameters = dict(sorted(self._parameters.items()))

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
                f"prompts.add(other_name, prompts[{twice[0]!r}])"
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

    def remove(self, task: str) -> None:
        """Remove a task. The indices of the tasks behind it become smaller by one."""
        self._check_known(task)
        del self._parameters[parameter_name(task)], self._starts[task]
        self._name_tasks(name for name in self._tasks if name != task)

    def freeze(self, task: str) -> None:
        """Stop training a task's prompt. Rows of the task still get the prompt."""
        self[task].requires_grad_(False)

    def unfreeze(self, task: str) -> None:
        """Let a frozen prompt train again."""
        self[task].requires_grad_(True)

    def task_ids(self, tasks: Iterable[str | None]) -> Tensor:
        """The indices of task names: int64 `[len(tasks)]`, with -1 for None, which means no prompt."""
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            if name is not None:
                self._check_known(name)
        return torch.tensor([-1 if name is None else self._indices[name] for name in names], dtype=torch.int64)

    def distinct(self, indices: Iterable[int]) -> list[int]:
        """The task indices among `indices`, each once and without -1, in the order of the tasks' names.

        The prompts of a batch go through a model in this order. A matrix product may round a row differently at another
        position, so this order keeps results equal to the bit however the tasks are listed.
        """
        return sorted({index for index in indices if index >= 0}, key=self._tasks.__getitem__)

    def packed(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prompts of these tasks one after another, `[sum of lengths, hidden]`, and int64 offsets on the CPU.

        If there are several ranks, the trainable prompts of all other tasks get gradients of zeros in backward passes.
        """
        chosen: list[Tensor] = [self[self._tasks[index]] for index in indices]
        offsets = torch.tensor([0, *(len(prompt) for prompt in chosen)]).cumsum(0)
        packed = torch.cat(chosen) if chosen else torch.zeros(0, self.hidden_size)
        if torch.is_grad_enabled() and has_several_ranks():
            packed = with_zero_gradients(packed, [prompt for prompt in self.parameters() if prompt.requires_grad])
        return packed, offsets

    def want_gradients(self, indices: Sequence[int]) -> bool:
        """Whether a forward pass over rows of these tasks must record gradients of prompts."""
        if not torch.is_grad_enabled():
            return False
        tasks = self._tasks if has_several_ranks() else [self._tasks[index] for index in indices]
        return any(self[task].requires_grad for task in tasks)

    def check_finite(self, indices: Iterable[int], dtype: torch.dtype) -> None:
        """Raise a `SoftPromptError` if a prompt of these tasks, cast to `dtype`, holds a number that is not finite."""
        tasks = [self._tasks[index] for index in self.distinct(indices)]
        are_finite = [self[task].detach().to(dtype).isfinite().all() for task in tasks]
        if tasks and not bool(torch.stack(are_finite).all()):  # one copy from the device
            spoilt = next(task for task, is_finite in zip(tasks, are_finite, strict=True) if not is_finite)
            raise SoftPromptError(
                f"the prompt of task {spoilt!r} holds a number that is not finite, or too large for {dtype}; train it "
                "again, or load a state of it from before"
            )

    def extra_repr(self) -> str:
        """The tasks and the shapes of their prompts, for PyTorch's `repr` of the module."""
        return ", ".join(f"{task!r}: {len(self[task])} × {self.hidden_size}" for task in self._tasks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftPrompts:
        # A prompt is moved but never cast: after a cast to bfloat16, a run could not be resumed exactly.
        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move, recurse)

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

    def _name_tasks(self, tasks: Iterable[str]) -> None:
        self._tasks = tuple(tasks)
        self._indices = {task: index for index, task in enumerate(self._tasks)}

    def _check_known(self, task: str) -> None:
        if task not in self._indices:
            known = ", ".join(map(repr, self._tasks)) or "none yet"
            raise SoftPromptError(f"unknown task {task!r}; known tasks: {known}")

    def _check_value(self, task: str, value: Tensor) -> None:
        if value.ndim != 2 or value.shape[0] < 1 or value.shape[1] != self.hidden_size:
            raise SoftPromptError(
                f"the prompt of task {task!r} must be [length, {self.hidden_size}] with length at least 1, "
                f"got {list(value.shape)}"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise SoftPromptError(f"the prompt of task {task!r} must hold finite floating-point numbers")
