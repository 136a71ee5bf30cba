"""`SoftPromptCallback`: prompt tuning for any LightningModule that holds a Hugging Face causal LM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_softprompt.attachment.attach import attach, attachment_of, detach
from lightning_softprompt.attachment.attachment import Attachment
from lightning_softprompt.attachment.loss import LogitsChoice
from lightning_softprompt.attachment.prefix_choice import PrefixChoice
from lightning_softprompt.attachment.summary import summary
from lightning_softprompt.base.loading import load_tokenizer
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.distributed import average_gradients
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.initializers import Initializer, as_initializer
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.training.agreement import check_tasks, take_templates
from lightning_softprompt.training.checkpoints import check_sizes, group_sizes
from lightning_softprompt.training.launchers import check_launcher
from lightning_softprompt.training.resuming import go_on
from lightning_softprompt.training.wiring import Wiring, expect_eval_mode, prompts_in, prompts_outside, put_prompts_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftPromptCallback(Callback):
    """Put soft prompts in front of the rows of the causal LM inside a LightningModule, and freeze the LM.

    The module needs no change. A batch says under `task_ids` (int64 `[batch]`) or `tasks` (names) which task each row
    belongs to. A module that calls `self.model(**batch)` passes these to the LM. For any other module the callback
    routes the tasks to the LM, but only in the thread that runs the step; a step that calls the LM in another thread
    must pass `task_ids` itself. If there is only one task, every row belongs to it. Trainable parameters of the module
    outside the LM keep training.

    Checkpoints hold the prompts, the module's other trainable parameters, and the optimizer's state. They leave the
    frozen base out, and loading them does not require it. After a run the prompts stay attached, so that the model can
    be used; `detach(model)` removes them.

    A callback may be used for several modules, for example one a fold: the prompts of each module start anew from
    `tasks`. Given `SoftPrompts` are the caller's own and go on with what they learned. A second run of the same module
    goes on, too.

    With a `TaskDataModule`, the tasks of its rows are compared with the prompts before the first step, and its
    templates become those of the prompts, except where a prompt has one already.

    Args:
        tasks: a dict that maps each task's name to how its prompt starts (a str means `Text(...)`, an int means
            `Vocabulary(length)`), or `SoftPrompts`, or the folder of saved prompts.
        tokenizer: the model's tokenizer or its id; only `Text` and `Labels` need it. None takes the `tokenizer` of the
            module or of the datamodule, else the one that was saved with the model.
        model: attribute path of the LM; only needed if the module holds several.
        prefix: see `attach`.
        logits: see `attach`.
        seed: the seed of starts that are sampled.
        micro_batch_size: see `attach`.

    Attributes:
        prompts: the `SoftPrompts` of the module that was run last, once its model is known.

    Raises:
        SoftPromptError: in setup or `configure_model`: a module that does not have exactly one causal LM, prompts that
            cannot be made, a task with rows and without a prompt, or a strategy such as ddp_spawn and ddp_fork, which
            trains in copies of the calling process. At fit start: a prompt that no optimizer trains. Before a step of
            the optimizer: a training step that never called the LM, or a task that was unfrozen while several processes
            train.

    Example:
        >>> from lightning_softprompt import SoftPromptCallback
        >>> callback = SoftPromptCallback(tasks={"sentiment": "Is it positive or negative?", "topic": 20})
        >>> callback.prompts is None  # the prompts are made when the model is known
        True
    """

    def __init__(
        self,
        tasks: dict[str, int | Initializer | str] | SoftPrompts | str,
        tokenizer: Any = None,
        model: str | None = None,
        prefix: PrefixChoice = "auto",
        logits: LogitsChoice = "all",
        seed: int = 0,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.model = model
        self.prefix = prefix
        self.logits = logits
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.prompts: SoftPrompts | None = tasks if isinstance(tasks, SoftPrompts) else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the prompts, now or as soon as the module has built its LM in `setup` or `configure_model`."""
        others = [c for c in trainer.callbacks if isinstance(c, SoftPromptCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise SoftPromptError("a Trainer takes one SoftPromptCallback; give it the tasks of all of them")
        if stage == "fit":
            check_launcher(trainer)
        self._saved_sizes: list[list[int]] = []
        self._stage, self._data = stage, getattr(trainer, "datamodule", None)
        self._tokenizer_owners = [pl_module, self._data]
        self._wiring = Wiring.install(pl_module, self.model, self._attach)
        self._wiring.is_armed = True  # a module may build its LM in setup or configure_model, also anew in each run
        if not isinstance(self.tasks, SoftPrompts):
            self.prompts = self._wiring.made
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # This strategy shards the base in configure_model, and prompts are attached after that. Lightning 2.6 then
            # loads a checkpoint parameter by parameter, so the hooks of `Checkpoints`, which accept that the base is
            # missing, are not called.
            pl_module.strict_loading = False
        else:
            self._wiring.attach_if_built()
        listed: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for earlier in listed[: listed.index(self)]:
            if isinstance(earlier, WeightAveraging | StochasticWeightAveraging):
                earlier.setup(trainer, pl_module, stage)  # its copy of the module was made before there were prompts

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model of a run without this callback as it is."""
        self._wiring.is_armed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before `fit` goes on, note how many parameters the saved optimizers held."""
        self._saved_sizes = group_sizes(state["param_groups"] for state in checkpoint.get("optimizer_states", ()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a `SoftPromptError` if a prompt that should train is in no optimizer, or saved states do not fit."""
        assert self.prompts is not None
        outside = prompts_outside(trainer.optimizers, self.prompts)
        if outside:
            raise SoftPromptError(
                f"no optimizer trains the prompts of {', '.join(map(repr, outside))}; return an optimizer from "
                f"{type(pl_module).__name__}.configure_optimizers (over any parameters: the prompts are added), or "
                "freeze these tasks with prompts.freeze(task)"
            )
        if self._saved_sizes:
            check_sizes(self._saved_sizes, trainer.optimizers, self.prompts)
        expect_eval_mode(pl_module, self._wiring.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count which tasks have rows. Say of a run that goes on in mid-epoch how exact that is."""
        resumed = go_on(trainer)
        if resumed is not None:
            rank_zero_info(resumed)
        presence = self._attachment().presence
        self._passes_before = presence.passes
        _, self._seen = presence.since({})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the prompts of tasks without rows since the last step unchanged: no gradient, no momentum, no decay."""
        assert self.prompts is not None
        presence = self._attachment().presence
        # Without any gradient the training step returned None, by which Lightning lets a batch be skipped.
        has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if has_gradients and presence.passes == self._passes_before:
            raise SoftPromptError(
                f"{type(pl_module).__name__}.training_step never called the causal LM itself (for example "
                "self.model(**batch)), so no row got its prompt; do not call its .forward or a part of it"
            )
        self._add_unfrozen(trainer)
        mine = prompts_in(optimizer, self.prompts)
        had_rows, counts = presence.since(self._seen)
        present = [task in had_rows for task in mine]
        if trainer.world_size > 1:  # the prompt of a task with rows on any rank changes on every rank
            if isinstance(trainer.strategy, ModelParallelStrategy):  # FSDP2 does not shard prompts, nor average them
                average_gradients([*mine.values()])
            flags = torch.tensor(present, dtype=torch.float32, device=pl_module.device)
            present = (trainer.strategy.reduce(flags, reduce_op="sum") > 0).tolist()
        for prompt, has_rows in zip(mine.values(), present, strict=True):
            if not has_rows:
                prompt.grad = None
        self._seen |= {task: counts.get(task, 0) for task in mine}

    def _add_unfrozen(self, trainer: Trainer) -> None:
        """Add the prompts that were unfrozen since the run began to the optimizer."""
        assert self.prompts is not None
        unfrozen = prompts_outside(trainer.optimizers, self.prompts)
        if unfrozen and trainer.world_size > 1:
            raise SoftPromptError(
                f"{', '.join(map(repr, unfrozen))} cannot be unfrozen while several processes train: they reduce the "
                "gradients of the prompts that trained from the start; unfreeze before fit"
            )
        if unfrozen:
            put_prompts_into(trainer.optimizers, self.prompts)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            for task in unfrozen:  # the scaler has unscaled gradients already, but not those of these prompts
                self.prompts[task].grad = None

    def _attach(self, model: PreTrainedModel) -> None:
        attachment = attachment_of(model)
        is_attached = attachment is not None and attachment.prompts is self.prompts
        if attachment is not None and not is_attached:
            detach(model)
        prompts = self._make_prompts(model) if self.prompts is None else self.prompts
        if isinstance(self._data, TaskDataModule):
            check_tasks(prompts, self._data, self._stage)
            take_templates(prompts, self._data)
        if not is_attached:
            attach(model, prompts, prefix=self.prefix, logits=self.logits, micro_batch_size=self.micro_batch_size)
        self.prompts = self._wiring.made = prompts
        attached = attachment_of(model)
        assert attached is not None
        rank_zero_info(summary(attached, self.prefix))

    def _make_prompts(self, model: PreTrainedModel) -> SoftPrompts:
        if isinstance(self.tasks, str | Path):
            return SoftPrompts.from_pretrained(self.tasks)
        if not isinstance(self.tasks, Mapping):
            raise SoftPromptError(
                f"tasks must map names to how their prompts start, or be SoftPrompts or a folder; got {self.tasks!r}"
            )
        initializers = {task: as_initializer(task, initializer) for task, initializer in self.tasks.items()}
        needs_tokenizer = any(initializer.needs_tokenizer for initializer in initializers.values())
        tokenizer = self._find_tokenizer(model) if needs_tokenizer else None
        return SoftPrompts.for_model(model, initializers, tokenizer=tokenizer, seed=self.seed)

    def _find_tokenizer(self, model: PreTrainedModel) -> Any:
        found = self.tokenizer
        for owner in self._tokenizer_owners:
            found = getattr(owner, "tokenizer", None) if found is None else found
        if found is not None and not isinstance(found, str | Path):
            return found
        try:
            return load_tokenizer(found or model.config._name_or_path)
        except SoftPromptError as error:
            raise SoftPromptError(
                f"a prompt starts from text, which needs a tokenizer: pass SoftPromptCallback(tokenizer=…). {error}"
            ) from error

    def _attachment(self) -> Attachment:
        attachment = attachment_of(self._wiring.model)
        if attachment is None:
            raise SoftPromptError("the soft prompts were detached during the run; leave them attached until it ends")
        return attachment
