"""`CollapseGuard`: a task that goes wrong is stopped from doing harm, and put back."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.gradients.events import Event
from lightning_softprompt.gradients.health import Health, Symptom
from lightning_softprompt.gradients.snapshots import Snapshot, Snapshots
from lightning_softprompt.gradients.stage import GradientStage, about_to_move, holds, optimizer_step
from lightning_softprompt.prompts import statistics

logger = logging.getLogger("lightning_softprompt")

Action = Literal["warn", "skip", "rewind", "stop"]
CollapseAction = Literal["warn", "rewind", "stop"]
BACK_OFF = 0.25  # of a task's learning rate, at each rewind

# Loss, where it is known; gradient norm; norm and token similarity of the prompt, where they are wanted.
Reading = tuple[float | None, float, tuple[float, float] | None]


class CollapseGuard(GradientStage):
    """Watch every task, and act on the one that goes wrong, before its step is taken; the others go on.

    - *non-finite*: its loss or its gradient is not a number. Where the loss of a batch is, but no gradient is, all
      tasks of the step are meant.
    - *spike*: its gradient's norm is over a hundred times the largest so far. More than `patience` in a row are no
      spike any more.
    - *collapse*: its loss is above its start (the mean of its first 8) at `patience` looks in a row, of 4 steps each,
      by more than a tenth and than noise explains; or it is not below its start, and the gradient has vanished, the
      prompt's norm has grown tenfold, or its tokens have become one. Or more than `patience` steps in a row were not
      finite.

    What is done: "warn" says so; "skip" drops the task's gradient, so that neither prompt nor moments move; "rewind"
    puts the prompt and the optimizer's moments back to the last snapshot at which all was well, and quarters the
    task's learning rate from there on; "stop" ends training. A task that ends in a collapse is put back, too, where
    that is the action; checkpoints that were written before have it as it was. A run in which nothing happens is, bit
    for bit, the run without the guard. Under "16-mixed" the gradient scaler has its own say: it skips a whole step
    where any gradient overflows, which the guard leaves to it while losses are finite.

    The loss of a task is what the module logs at each step as `train/loss/<task>` (`CausalLMModule` does); of a module
    that does not, the loss of the batches that the task had rows in. The device is asked once a step.

    Args:
        on_nonfinite: action.
        on_spike: action.
        on_collapse: action; not "skip".
        patience: see above.
        snapshot_every_n_steps: of the task, at least: a snapshot is taken when a look has found nothing wrong. Three
            are kept of each task, the first and the newest two, with Adam nine times the prompt's size.

    Attributes:
        events: what happened, in order.

    Example:
        >>> from lightning_softprompt import CollapseGuard
        >>> CollapseGuard(on_spike="warn").events
        []
    """

    order = 1

    def __init__(
        self,
        on_nonfinite: Action = "skip",
        on_spike: Action = "skip",
        on_collapse: CollapseAction = "rewind",
        patience: int = 3,
        snapshot_every_n_steps: int = 50,
    ) -> None:
        super().__init__()
        self._actions = {"nonfinite": on_nonfinite, "spike": on_spike, "collapse": on_collapse}
        for seen, action in self._actions.items():
            check_choice(f"on_{seen}", action, CollapseAction if seen == "collapse" else Action)
        for name, number in (("patience", patience), ("snapshot_every_n_steps", snapshot_every_n_steps)):
            if number < 1:
                raise SoftPromptError(f"{name} must be at least 1, got {number!r}")
        self.patience = patience
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.events: list[Event] = []
        self._health: dict[str, Health] = {}
        self._snapshots: dict[str, Snapshots] = {}
        self._since: dict[str, int] = {}  # steps of the task since its newest snapshot
        self._factors: dict[str, float] = {}
        self._losses: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._before: dict[nn.Parameter, tuple[Tensor, float]] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look behind each optimizer's step, too: before the monitor, which is to see what is done there."""
        self._remove_hooks()
        attachment = self.attachment(pl_module)
        prompts = attachment.prompts
        _, self._seen = attachment.presence.since({})
        for task in [
            task for task in self._health if task not in prompts or not self._snapshots[task].fits(prompts[task])
        ]:
            for kept in (self._health, self._snapshots, self._since, self._factors):
                kept.pop(task, None)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take note of the loss of each task."""
        loss = loss.detach() * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.get_scale()
        attachment = self.attachment(pl_module)
        had_rows, self._seen = attachment.presence.since(self._seen)
        for task in sorted(had_rows):
            if attachment.prompts[task].requires_grad:
                logged = _logged_loss(trainer, task)
                self._losses.setdefault(task, []).append(loss if logged is None else logged.detach().to(loss.device))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at every task that is about to move."""
        self.check_gradients_are_unscaled(trainer, optimizer)
        attachment = self.attachment(pl_module)
        step, moving = optimizer_step(trainer), about_to_move(optimizer, attachment.prompts)
        for task in moving:
            if task not in self._health:
                self._health[task], self._snapshots[task], self._since[task] = Health(self.patience), Snapshots(), 0
        found = self._read(trainer, pl_module, sorted(attachment.prompts), moving)
        self._before = {}
        for task, prompt in moving.items():
            loss, norm, wanted = found[task]
            if self._is_left_to_the_scaler(trainer, loss, norm):
                continue
            health = self._health[task]
            symptom = health.step(loss, norm, wanted)
            is_due = health.is_vouched_for and self._since[task] >= self.snapshot_every_n_steps
            if is_due or not self._snapshots[task].snapshots:
                self._snapshots[task].add(Snapshot.take(step, prompt, optimizer))
                self._since[task] = 0
            self._since[task] += 1
            if symptom is not None:
                self._act(trainer, optimizer, task, prompt, symptom, step)
            if prompt.grad is not None and task in self._factors:
                self._before[prompt] = prompt.detach().clone(), self._factors[task]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take back what a step did too much, of tasks that were rewound: whatever the optimizer, a smaller rate."""
        for prompt, (before, factor) in self._before.items():
            prompt.copy_(torch.lerp(before, prompt, factor))
        self._before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put tasks back that end in a collapse."""
        prompts = self.attachment(pl_module).prompts
        for task in [task for task in self._health if task in prompts and self._actions["collapse"] == "rewind"]:
            prompt, reason = prompts[task], self._health[task].ends_badly()
            if reason is None and not bool(prompt.isfinite().all()):
                reason = "the prompt is not finite"
            optimizer = next((optimizer for optimizer in trainer.optimizers if holds(optimizer, prompt)), None)
            if reason and optimizer is not None and prompt.requires_grad:
                self._act(trainer, optimizer, task, prompt, Symptom("collapse", reason), optimizer_step(trainer))
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Everything, snapshots included: tensors and primitives."""
        return {
            "events": [asdict(event) for event in self.events],
            "health": {task: asdict(health) for task, health in self._health.items()},
            "snapshots": {task: snapshots.state() for task, snapshots in self._snapshots.items()},
            "since": dict(self._since),
            "factors": dict(self._factors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved run was."""
        self.events = [Event(**event) for event in state_dict["events"]]
        self._health = {
            task: Health(**{**health, "patience": self.patience}) for task, health in state_dict["health"].items()
        }
        saved = state_dict["snapshots"].items()
        self._snapshots = {
            task: Snapshots([Snapshot(**snapshot) for snapshot in snapshots]) for task, snapshots in saved
        }
        self._since, self._factors = dict(state_dict["since"]), dict(state_dict["factors"])

    def _read(
        self, trainer: Trainer, pl_module: LightningModule, tasks: list[str], moving: dict[str, nn.Parameter]
    ) -> dict[str, Reading]:
        """What is to be known of each task, from one look at the device."""
        losses = {task: values for task in moving if (values := self._losses.pop(task, None))}
        table = torch.zeros(len(tasks), 2, device=pl_module.device)
        if losses:
            rows = [row for row, task in enumerate(tasks) if task in losses]
            stacked = [torch.stack(losses[tasks[row]]).float() for row in rows]
            table[rows] = torch.stack([torch.stack([each.sum(), torch.ones_like(each).sum()]) for each in stacked])
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="sum")
        numbers: list[Tensor] = []
        for task, prompt in moving.items():
            assert prompt.grad is not None
            numbers.append(torch.linalg.vector_norm(prompt.grad))
            if self._health[task].wants_signals:
                value = prompt.detach()
                numbers += [torch.linalg.vector_norm(value), statistics.token_similarity(value)]
        flat = torch.cat([table.flatten(), *(number.reshape(1) for number in numbers)]).tolist()
        first_of, rest = {task: 2 * row for row, task in enumerate(tasks)}, iter(flat[2 * len(tasks) :])
        found: dict[str, Reading] = {}
        for task in moving:
            total, count = flat[first_of[task] : first_of[task] + 2]
            norm = next(rest)
            wanted = (next(rest), next(rest)) if self._health[task].wants_signals else None
            found[task] = total / count if count else None, norm, wanted
        return _without_shared_blame(found)

    def _act(
        self, trainer: Trainer, optimizer: Optimizer, task: str, prompt: nn.Parameter, symptom: Symptom, step: int
    ) -> None:
        if symptom.seen == "collapse" and self._health[task].not_finite and self._actions["collapse"] == "warn":
            symptom = Symptom("nonfinite", symptom.detail)  # that of a single step still holds
        action = self._actions[symptom.seen]
        if action == "rewind" and not self._health[task].taken and self._factors.get(task, 1.0) < 1:
            action = "skip"  # put back, and not moved since: further back is no better
        if action != "warn":
            prompt.grad = None
        detail = symptom.detail
        if action == "rewind":
            snapshot = self._snapshots[task].take_back()
            snapshot.put_back(prompt, optimizer)
            self._factors[task] = self._factors.get(task, 1.0) * BACK_OFF
            self._health[task].rewound()
            detail += f" (back to step {snapshot.step}, learning rate times {self._factors[task]:.3g} from now on)"
        elif action == "stop":
            trainer.should_stop = True
            detail += "; try a lower learning rate, warm-up, or on_collapse='rewind', and look at grad_norm and loss"
        self.events.append(Event(step, task, symptom.seen, action, detail))
        if trainer.is_global_zero:
            logger.warning("%s", self.events[-1])

    def _is_left_to_the_scaler(self, trainer: Trainer, loss: float | None, norm: float) -> bool:
        """Whether a gradient overflowed by the scale of "16-mixed", which is then lowered, and the step skipped."""
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        return is_scaled and not math.isfinite(norm) and (loss is None or math.isfinite(loss))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._losses, self._before = [], {}, {}


def _logged_loss(trainer: Trainer, task: str) -> Tensor | None:
    """What the module logged of this step; `callback_metrics` also has the epochs before, and asks the device."""
    results: Any = trainer._results
    result = results.get(f"training_step.train/loss/{task}") if results else None
    return result._forward_cache if result is not None and result.meta.on_step else None


def _without_shared_blame(found: dict[str, Reading]) -> dict[str, Reading]:
    """A batch's loss that is no number was spoiled by the tasks whose gradients are none; the others' is not known."""
    if all(math.isfinite(norm) for _, norm, _ in found.values()):
        return found
    return {
        task: (None if math.isfinite(norm) and not math.isfinite(loss or 0.0) else loss, norm, wanted)
        for task, (loss, norm, wanted) in found.items()
    }
