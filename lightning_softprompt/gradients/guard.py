"""`CollapseGuard`: watch the training of each task, and skip or undo what goes wrong."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.errors import check_at_least_one, check_choice
from lightning_softprompt.gradients.events import Event
from lightning_softprompt.gradients.health import Health, Reading, Symptom, without_shared_blame
from lightning_softprompt.gradients.snapshots import Snapshot, Snapshots
from lightning_softprompt.gradients.stage import GradientStage, about_to_move, optimizer_step
from lightning_softprompt.prompts import statistics
from lightning_softprompt.training.wiring import prompts_in

logger = logging.getLogger("lightning_softprompt")

Action = Literal["warn", "skip", "rewind", "stop"]
CollapseAction = Literal["warn", "rewind", "stop"]
BACK_OFF = 0.25  # factor on a task's learning rate at each rewind


class CollapseGuard(GradientStage):
    """Watch every task, and act on a task that goes wrong before its step is taken. The other tasks train on.

    - *non-finite*: the task's loss or gradient is NaN or infinite. If the loss of a whole batch is not finite and every
      gradient is, every task with rows in the batch counts as non-finite.
    - *spike*: the norm of the task's gradient is more than a hundred times the largest so far. After `patience` spikes
      in a row, such norms count as normal.
    - *collapse*: the last `patience` checks of the task's loss were bad. Each check takes the median loss of 4 steps
      and compares it with the start, the mean of the task's first 8 losses. It is bad if the median is higher by more
      than a tenth and by more than noise explains. It is also bad if the median is not below the start and the gradient
      has vanished, the prompt's norm has grown tenfold, or the prompt's tokens have become one. More than `patience`
      non-finite steps in a row are a collapse, too.

    The actions are: "warn" only logs a warning. "skip" drops the task's gradient, so that neither the prompt nor the
    optimizer's moments change. "rewind" puts the prompt and the moments back to the newest snapshot, and multiplies the
    task's learning rate by a quarter from then on. "stop" ends training. With `on_collapse="rewind"`, a task whose loss
    is bad or whose prompt is not finite at the end of training is put back, too; checkpoints that were written before
    that hold the bad prompt. Every snapshot is finite, prompt and moments: a state that is not when a snapshot is due
    counts as a collapse.

    If nothing goes wrong, a run is equal to the bit to one without the guard. With precision "16-mixed", the gradient
    scaler skips a whole step if any gradient overflows; while losses are finite, the guard leaves such steps to it.

    The loss of a task is what the module logs at each step as `train/loss/<task>` or `train/label_loss/<task>`, as
    `CausalLMModule` does. If the module logs neither, it is the loss of the batches in which the task had rows. Values
    are copied from the device once per step.

    Args:
        on_nonfinite: the action on a non-finite step.
        on_spike: the action on a spike.
        on_collapse: the action on a collapse; "skip" is not possible.
        patience: the number of bad checks in a row that are a collapse; also the largest number of large norms in a row
            that count as spikes, and of non-finite steps in a row that are not yet a collapse.
        snapshot_every_n_steps: the fewest steps of a task between two of its snapshots, which are taken when a check
            found nothing wrong. Of each task the first and the newest two are kept; with Adam this takes nine times the
            prompt's memory.

    Attributes:
        events: everything that went wrong, in order.

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
        check_at_least_one(patience=patience, snapshot_every_n_steps=snapshot_every_n_steps)
        self.patience = patience
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.forget()
        self._losses: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._before: dict[nn.Parameter, tuple[Tensor, float]] = {}

    def forget(self) -> None:
        """Forget events, losses, norms, snapshots and rates."""
        self.events: list[Event] = []
        self._health: dict[str, Health] = {}
        self._snapshots: dict[str, Snapshots] = {}
        self._since: dict[str, int] = {}  # number of steps of the task since its newest snapshot
        self._factors: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register a hook that runs after each optimizer's step, before that of `PromptGradientNorm`."""
        super().on_fit_start(trainer, pl_module)
        self._run_after_steps(trainer, self._after_step)
        attachment = self.attachment(pl_module)
        prompts = attachment.prompts
        _, self._seen = attachment.presence.since({})
        for task in [
            task for task in self._health if task not in prompts or not self._snapshots[task].fits(prompts[task])
        ]:
            for kept in (self._health, self._snapshots, self._since, self._factors):
                kept.pop(task, None)
        for snapshots in self._snapshots.values() if trainer.ckpt_path is None else ():
            snapshots.forget_moments()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of each task that had rows."""
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
        """Check every task whose prompt the optimizer is about to change, and act on those that go wrong."""
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
                found_now = self._keep(Snapshot.take(step, prompt, optimizer), task)
                symptom = symptom or found_now
            self._since[task] += 1
            if symptom is not None:
                self._act(trainer, optimizer, task, prompt, symptom, step)
            if prompt.grad is not None and task in self._factors:
                self._before[prompt] = prompt.detach().clone(), self._factors[task]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Shorten the step of each task that was rewound, which acts as a lower learning rate with any optimizer."""
        for prompt, (before, factor) in self._before.items():
            prompt.copy_(torch.lerp(before, prompt, factor))
        self._before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rewind the tasks that are in a bad state at the end of training."""
        prompts = self.attachment(pl_module).prompts
        can_go_back = [task for task in self._health if task in prompts and self._snapshots[task].snapshots]
        for task in can_go_back if self._actions["collapse"] == "rewind" else []:
            prompt, reason = prompts[task], self._health[task].ends_badly()
            if reason is None and not bool(prompt.isfinite().all()):
                reason = "the prompt is not finite"
            optimizer = next((each for each in trainer.optimizers if task in prompts_in(each, prompts)), None)
            if reason and optimizer is not None and prompt.requires_grad:
                self._act(trainer, optimizer, task, prompt, Symptom("collapse", reason), optimizer_step(trainer))
        super().on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, snapshots included, as tensors and primitives."""
        return {
            "events": [asdict(event) for event in self.events],
            "health": {task: asdict(health) for task, health in self._health.items()},
            "snapshots": {task: snapshots.state() for task, snapshots in self._snapshots.items()},
            "since": dict(self._since),
            "factors": dict(self._factors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the saved run."""
        self.events = [Event(**event) for event in state_dict["events"]]
        self._health = {
            task: Health(**{**health, "patience": self.patience}) for task, health in state_dict["health"].items()
        }
        self._snapshots = {task: Snapshots.from_state(state) for task, state in state_dict["snapshots"].items()}
        self._since, self._factors = dict(state_dict["since"]), dict(state_dict["factors"])

    def _read(
        self, trainer: Trainer, pl_module: LightningModule, tasks: list[str], moving: dict[str, nn.Parameter]
    ) -> dict[str, Reading]:
        """The reading of each task in `moving`, with one copy from the device."""
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
        return without_shared_blame(found)

    def _keep(self, snapshot: Snapshot, task: str) -> Symptom | None:
        """Keep a snapshot that is finite; one that is not is a collapse, whatever the loss looks like."""
        if not snapshot.is_finite:
            return Symptom("collapse", "the prompt or the optimizer's state for it is not finite")
        self._snapshots[task].add(snapshot)
        self._since[task] = 0
        return None

    def _act(
        self, trainer: Trainer, optimizer: Optimizer, task: str, prompt: nn.Parameter, symptom: Symptom, step: int
    ) -> None:
        if symptom.seen == "collapse" and self._health[task].not_finite and self._actions["collapse"] == "warn":
            symptom = Symptom("nonfinite", symptom.detail)  # the action on a single step still applies
        action = self._actions[symptom.seen]
        kept = self._snapshots[task].snapshots
        is_new = not self._health[task].taken and self._factors.get(task, 1.0) < 1  # no good step since the last rewind
        # Where the last rewind is still in place, an older snapshot would not help; a new corruption needs one.
        if action == "rewind" and (not kept or (is_new and Snapshot.take(step, prompt, optimizer).is_finite)):
            action = "skip"
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
        """Whether the gradient overflowed due to the loss scale of "16-mixed", so that the scaler skips the step."""
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        return is_scaled and not math.isfinite(norm) and (loss is None or math.isfinite(loss))

    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        self._losses, self._before = {}, {}


def _logged_loss(trainer: Trainer, task: str) -> Tensor | None:
    """The loss that the module logged for the task in this step, or None.

    It is read from Lightning's results: `callback_metrics` holds values of earlier epochs, too, and copies them.
    """
    results: Any = trainer._results or {}
    for name in ("loss", "label_loss"):
        result = results.get(f"training_step.train/{name}/{task}")
        if result is not None and result.meta.on_step:
            return torch.as_tensor(result._forward_cache)
    return None
