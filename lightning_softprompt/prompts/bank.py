"""The prompts of a bank as parameters of a module: found by name, indexed, packed and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_softprompt.distributed import has_several_ranks, with_zero_gradients
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import check_task_name, parameter_name
from lightning_softprompt.prompts.templates import TaskTemplate


class PromptBank(nn.Module):
    """One trainable matrix `[length, hidden]` for each task name; `SoftPrompts` says how they are made and saved.

    One thread may add, rename and remove tasks while others read: who holds a name that is known finds its prompt.

    Args:
        hidden_size: width of a virtual token.

    Attributes:
        templates: how a task's rows become text and target, by task.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        # They are no parameters of the module, so that optimizers, checkpoints and averaged weights know nothing of
        # them, also where they come and go during a run.
        self._teachers: dict[str, nn.Parameter] = {}
        self.templates: dict[str, TaskTemplate] = {}
        self._starts: dict[str, str] = {}
        self._name_tasks([])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names; the position of a task among them is its index."""
        return self._tasks

    @property
    def teachers(self) -> tuple[str, ...]:
        """The tasks whose prompts are hard ones that others are distilled from. They never train and are not saved."""
        return tuple(task for task in self._tasks if task in self._teachers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of virtual tokens of each task, in the order of `tasks`."""
        return tuple(len(self[task]) for task in self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self._indices

    def __getitem__(self, task: str) -> nn.Parameter:
        self.check_known(task)
        parameter = self._teachers.get(task, self._parameters.get(parameter_name(task)))
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def starts(self) -> Mapping[str, str]:
        """How each task's prompt started, in words."""
        return self._starts

    def rename(self, task: str, new: str) -> None:
        """Give a task another name. Its prompt, its index and its template stay what they are.

        Raises:
            SoftPromptError: an unknown task, or a name that cannot be used or is taken.
        """
        prompt, is_teacher = self[task], task in self._teachers
        check_task_name(new)
        if new in self:
            raise SoftPromptError(f"there is a task {new!r} already; remove it first or choose another name")
        self._put(new, prompt, is_teacher)
        self._name_tasks([new if name == task else name for name in self._tasks])
        self._take_out(task)
        self._starts[new] = self._starts.pop(task)
        if task in self.templates:
            self.templates[new] = self.templates.pop(task)

    def remove(self, task: str) -> None:
        """Remove a task. The indices of the tasks behind it become smaller by one."""
        self.check_known(task)
        self._name_tasks(name for name in self._tasks if name != task)
        self._take_out(task)
        del self._starts[task]
        self.templates.pop(task, None)

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
                self.check_known(name)
        return torch.tensor(
            [-1 if name is None else self._indices[name] for name in names], dtype=torch.int64, device="cpu"
        )

    @staticmethod
    def distinct(tasks: Iterable[str | None]) -> tuple[str, ...]:
        """The names among `tasks`, each once and without None, in their order.

        The prompts of a batch go through a model in this order. A matrix product may round a row differently at another
        position, so this order keeps results equal to the bit however the tasks are listed.
        """
        return tuple(sorted({task for task in tasks if task is not None}))

    def packed(self, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The prompts of these tasks one after another, `[sum of lengths, hidden]`, and int64 offsets on the CPU.

        If there are several ranks, the trainable prompts of all other tasks get gradients of zeros in backward passes.
        """
        chosen: list[Tensor] = [self[task] for task in tasks]
        offsets = torch.tensor([0, *(len(prompt) for prompt in chosen)], device="cpu").cumsum(0)
        packed = torch.cat(chosen) if chosen else torch.zeros(0, self.hidden_size)
        return self.with_zero_gradients(packed), offsets

    def with_zero_gradients(self, value: Tensor) -> Tensor:
        """`value` unchanged; if there are several ranks, backward through it gives every trainable prompt zeros."""
        if torch.is_grad_enabled() and has_several_ranks():
            return with_zero_gradients(value, [prompt for prompt in self.parameters() if prompt.requires_grad])
        return value

    def want_gradients(self, tasks: Sequence[str]) -> bool:
        """Whether a forward pass over rows of these tasks must record gradients of prompts."""
        if not torch.is_grad_enabled():
            return False
        return any(self[task].requires_grad for task in (self._tasks if has_several_ranks() else tasks))

    def check_finite(self, tasks: Iterable[str | None], dtype: torch.dtype) -> None:
        """Raise a `SoftPromptError` if a prompt of these tasks, cast to `dtype`, holds a number that is not finite."""
        tasks = self.distinct(tasks)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptBank:
        # A prompt is moved but never cast: after a cast to bfloat16, a run could not be resumed exactly.
        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        for task, teacher in self._teachers.items():
            self._teachers[task] = nn.Parameter(move(teacher.detach()), requires_grad=False)
        return super()._apply(move, recurse)

    def _take_out(self, task: str) -> None:
        if self._teachers.pop(task, None) is None:
            gone = parameter_name(task)
            self._parameters = {name: prompt for name, prompt in self._parameters.items() if name != gone}

    def _put(self, task: str, prompt: nn.Parameter, is_teacher: bool = False) -> None:
        """Register a prompt, in the order of names: an optimizer's state, which goes by position, then goes by name."""
        if is_teacher:
            prompt.requires_grad_(False)
            self._teachers[task] = prompt
            return
        self._parameters = dict(sorted({**self._parameters, parameter_name(task): prompt}.items()))

    def _name_tasks(self, tasks: Iterable[str]) -> None:
        self._tasks = tuple(tasks)
        self._indices = {task: index for index, task in enumerate(self._tasks)}

    def check_known(self, task: str) -> None:
        if task not in self._indices:
            known = ", ".join(map(repr, self._tasks)) or "none yet"
            raise SoftPromptError(f"unknown task {task!r}; known tasks: {known}")

    def _check_value(self, task: str, value: Tensor) -> None:
        if value.ndim != 2 or value.shape[0] < 1 or value.shape[1] != self.hidden_size:
            raise SoftPromptError(
                f"the prompt of task {task!r} must be [length, {self.hidden_size}] with length at least 1, "
                f"got {list(value.shape)}"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value.float()).all()):
            raise SoftPromptError(f"the prompt of task {task!r} must hold finite floating-point numbers")
