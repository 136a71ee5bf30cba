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
from lightning_softprompt.prompts.folder import Saved, load_folder, save_folder
from lightning_softprompt.prompts.hub import find_folder, push
from lightning_softprompt.prompts.index import Description, Entry
from lightning_softprompt.prompts.initializers import Initializer, InitializerContext, as_initializer, sources_first
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import check_templates

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
    def from_pretrained(
        cls,
        folder: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> SoftPrompts:
        """Load prompts that `save_pretrained` or `push_to_hub` wrote. All is checked before any prompt is made.

        Args:
            folder: a folder, the file of a checkpoint as in `from_checkpoint`, or, where there is neither, an id on the
                Hugging Face Hub, as `"user/name"`.
            revision: the branch, tag or commit on the Hub; None means its main branch.
            token: the Hub's token; None means the one of your login, False none.
            cache_dir: where to keep what is downloaded; None means the Hub's usual cache.

        Raises:
            SoftPromptError: neither a folder nor an id on the Hub, or a file that is missing, damaged, of another
                format, or does not fit the other file.
        """
        if Path(folder).is_file():
            return cls.from_checkpoint(folder)
        return cls._of(load_folder(find_folder(folder, revision, token, cache_dir)))

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
        return cls._of(read_checkpoint(checkpoint))

    @classmethod
    def _of(cls, saved: Saved) -> SoftPrompts:
        prompts = cls(saved.hidden_size, saved.base)
        for entry in saved.entries:
            prompts.add(entry.task, saved.tensors[entry.task])
            prompts._starts[entry.task] = entry.start
            prompts[entry.task].requires_grad_(not entry.frozen)
            if entry.template is not None:
                prompts.templates[entry.task] = entry.template
        return prompts

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all prompts and their templates into `folder`, as one safetensors and one JSON file.

        An earlier save is replaced whole. Other processes may read the folder meanwhile, and wait to write into it.

        Args:
            folder: the folder; it is made if it does not exist.

        Raises:
            SoftPromptError: a prompt that is not finite, a template that cannot be used or whose task is not here, or a
                folder that cannot be written. The prompts that are in the folder stay what they are then.

        Example:
            >>> import tempfile, torch
            >>> from lightning_softprompt import TaskTemplate
            >>> prompts = SoftPrompts(hidden_size=4)
            >>> prompts.add("topic", torch.zeros(3, 4))
            >>> prompts.templates["topic"] = TaskTemplate("{headline} =>", " {topic}")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     prompts.save_pretrained(folder)
            ...     SoftPrompts.from_pretrained(folder).templates["topic"].text
            '{headline} =>'
        """
        save_folder(Path(folder), self._saved())

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Save the prompts on the Hugging Face Hub, in one commit. `from_pretrained(repo_id)` loads them from there.

        Args:
            repo_id: `"user/name"`; the repository is made if it does not exist.
            private: whether a repository that is made is private; None means the default of its owner.
            token: the Hub's token; None means the one of your login.
            commit_message: what the commit says; None means "Upload soft prompts".
            revision: the branch, which is made if it does not exist; None means the main branch.

        Returns:
            The address of the commit.

        Raises:
            SoftPromptError: prompts that `save_pretrained` would refuse, or what the Hub refuses.
        """
        return push(self._saved(), repo_id, private, token, commit_message, revision)

    def _saved(self) -> Saved:
        strangers = [task for task in self.templates if task not in self]
        if strangers:
            raise SoftPromptError(
                f"there is a template of task {strangers[0]!r}, and no such task; remove it from `templates`, or "
                f"name one of {', '.join(map(repr, self._tasks)) or 'the tasks that you add'}"
            )
        check_templates(self.templates)
        described = self.description()
        tensors = {entry.task: self[entry.task].detach().cpu().contiguous() for entry in described.entries}
        return Saved(**vars(described), tensors=tensors)

    def description(self) -> Description:
        """What folders and checkpoints say of the prompts beside their values. Teachers are left out."""
        entries = [
            Entry(task, len(self[task]), self._starts[task], not self[task].requires_grad, self.templates.get(task))
            for task in self._tasks
            if task not in self._teachers
        ]
        return Description(self.hidden_size, self.base, entries)

    def add(
        self,
        task: str,
        start: Tensor | str | int | Initializer,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        teacher: bool = False,
    ) -> None:
        """Add a task.

        Args:
            task: any non-empty text without path separators and control characters.
            start: the prompt's first value, `[length, hidden]`, or how the prompt starts.
            model: the base model; needed unless `start` is a tensor.
            tokenizer: the base model's tokenizer; only `Text` and `Labels` need it.
            seed: the seed of a start that is sampled.
            teacher: whether the prompt is only there to distil others from; see `teachers`.
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
        device = next((prompt.device for prompt in self.parameters()), value.device)
        self._put(task, nn.Parameter(value.detach().to(device, torch.float32, copy=True)), teacher)
        self._starts[task] = described
        self._name_tasks([*self._tasks, task])

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
                f"prompts.rename({twice[0]!r}, other_name), or the command rename-task"
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
            self._take(task, other)

    def subset(self, tasks: Iterable[str]) -> SoftPrompts:
        """A copy of the prompts of these tasks, in this order, with their templates."""
        chosen = SoftPrompts(self.hidden_size, self.base)
        for task in [tasks] if isinstance(tasks, str) else tasks:
            chosen._take(task, self)
        return chosen

    def _take(self, task: str, other: SoftPrompts) -> None:
        self.add(task, other[task].detach(), teacher=task in other.teachers)
        self._starts[task] = other.starts[task]
        self[task].requires_grad_(other[task].requires_grad)
        if task in other.templates:
            self.templates[task] = copy.deepcopy(other.templates[task])

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise a `SoftPromptError` unless there is at least one task and the prompts were made for `model`."""
        if not self._tasks:
            raise SoftPromptError("there is no task in these prompts; add one first")
        width = BaseModel.of(model).hidden_size
        if self.hidden_size != width:
            made_for = f" ({self.base.name})" if self.base is not None and self.base.name else ""
            raise SoftPromptError(
                f"the prompts are {self.hidden_size} wide, the embeddings of {type(model).__name__} are {width}; "
                f"these prompts were made for another base model{made_for}; load that one"
            )
        if self.base is not None:
            self.base.check(model)
