"""`PromptGradientNorm`: what each task's gradient and prompt do, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.gradients.guard import CollapseGuard
from lightning_softprompt.gradients.stage import GradientStage, about_to_move, optimizer_step
from lightning_softprompt.prompts import statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOTAL = "total"


class PromptGradientNorm(GradientStage):
    """Log, for each task with rows in a step, how its gradient and its prompt do.

    Names are the same in every logger; nothing is computed on other steps, and the device is asked once on these.

    | name | what it is |
    |---|---|
    | `grad_norm/<task>`, `grad_norm/total` | norm of the gradient, unscaled and accumulated, before anything clips it |
    | `grad_norm_clipped/<task>` | the same as the optimizer saw it; 0 where the step was skipped |
    | `prompt_norm/<task>` | norm of the prompt `[length, hidden]` before the step |
    | `update_ratio/<task>` | norm of what the step changed over `prompt_norm` |
    | `token_similarity/<task>` | mean cosine of the prompt's tokens: 1 once they have collapsed onto each other |
    | `effective_rank/<task>` | directions that the tokens span, 1 to the prompt's length |
    | `vocabulary_distance/<task>` | token norms outside the vocabulary's 1st to 99th percentile, in its medians |
    | `task_similarity` | mean cosine of the mean tokens of every two tasks of the step |

    The progress bar shows the largest gradient, and whose it is, as `grad_norm`.

    Args:
        every_n_steps: None: as often as the Trainer logs (`log_every_n_steps`).

    Attributes:
        history: every logged value, `(step, value)` by name.

    Raises:
        SoftPromptError: at the start of training, a task named "total".

    Example:
        >>> from lightning_softprompt import PromptGradientNorm
        >>> PromptGradientNorm(every_n_steps=10).history
        {}
    """

    place = 0

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise SoftPromptError(f"every_n_steps must be at least 1, or None, got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._look: _Look | None = None
        self._handles: list[Any] = []
        self._prompts: dict[str, Tensor] = {}
        self._guard: CollapseGuard | None = None
        self._next = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look behind each optimizer's step, too."""
        attachment = self.attachment(pl_module)
        if TOTAL in attachment.prompts:
            raise SoftPromptError(
                f"a task named {TOTAL!r} and the norm of all tasks would both be logged as grad_norm/{TOTAL}; rename it"
            )
        embedding: Any = attachment.model.get_input_embeddings()
        weight = next(embedding.parameters())
        self._band = statistics.norm_band(embedding, getattr(embedding, "num_embeddings", len(weight)), weight.device)
        every = self._every(trainer)
        self._next = (optimizer_step(trainer) // every + 1) * every if every else 0
        self._prompts = {task: attachment.prompts[task] for task in attachment.prompts}
        self._guard = next((c for c in trainer.callbacks if isinstance(c, CollapseGuard)), None)  # type: ignore[attr-defined]
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure what comes in."""
        step = optimizer_step(trainer)
        if not self._next or step + 1 < self._next:
            return
        self.check_gradients_are_unscaled(trainer, optimizer)
        if self._look is None or self._look.step != step:
            self._look = _Look(step)
        self._look.before(about_to_move(optimizer, self.attachment(pl_module).prompts))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._look is not None:
            self._look.after()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured in the step that just ended."""
        look, self._look = self._look, None
        if look is None or not look.tasks:
            return
        values = look.values(self._band)
        for name, value in values.items():
            self.history.setdefault(name, []).append((look.step, value))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=look.step)
        every = self._every(trainer)
        self._next = ((look.step + 1) // every + 1) * every
        worst = max(look.tasks, key=lambda task: (math.isnan(norm := values[f"grad_norm/{task}"]), norm))
        trainer.progress_bar_metrics["grad_norm"] = f"{worst} {values[f'grad_norm/{worst}']:.2g}"  # type: ignore[assignment]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers alone."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": {name: [list(point) for point in points] for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the saved run."""
        history = state_dict["history"].items()
        self.history = {name: [(int(step), value) for step, value in points] for name, points in history}

    def plot(self) -> Figure:
        """Norms of each task over the steps, with clipped steps and the guard's events, and how alike the tasks are.

        Returns:
            A matplotlib figure.
        """
        from lightning_softprompt.gradients.figure import draw

        if not self.history:
            raise SoftPromptError("nothing was logged yet; call plot() after trainer.fit")
        return draw(self.history, self._guard.events if self._guard else [], self._prompts)

    def _every(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass
class _Look:
    """The tensors of one step, on the device until all are asked for at once."""

    step: int
    tasks: dict[str, nn.Parameter] = field(default_factory=dict)
    _norms: dict[str, Tensor] = field(default_factory=dict)
    _clipped: dict[str, Tensor] = field(default_factory=dict)
    _prompts: dict[str, Tensor] = field(default_factory=dict)
    _updates: dict[str, Tensor] = field(default_factory=dict)

    def before(self, tasks: dict[str, nn.Parameter]) -> None:
        """Take gradients' norms and prompts as they come in."""
        self.tasks.update(tasks)
        for task in tasks:  # a second step in one batch
            self._clipped.pop(task, None)
            self._updates.pop(task, None)
        self._norms.update({task: _gradient_norm(prompt) for task, prompt in tasks.items()})
        self._prompts.update({task: prompt.detach().clone() for task, prompt in tasks.items()})

    def after(self) -> None:
        """Take what the optimizer saw, and what it changed."""
        for task, prompt in self.tasks.items():
            if task not in self._clipped:
                self._clipped[task] = _gradient_norm(prompt)
                self._updates[task] = torch.linalg.vector_norm(prompt.detach() - self._prompts[task])

    def values(self, band: Tensor) -> dict[str, float]:
        """Everything that is logged, by name; `band` is of `norm_band`."""
        found: dict[str, Tensor] = {}
        for task, prompt in self._prompts.items():
            norm = torch.linalg.vector_norm(prompt)
            found[f"grad_norm/{task}"] = self._norms[task]
            if task in self._clipped:  # precision "16-mixed" leaves steps out
                found[f"grad_norm_clipped/{task}"] = self._clipped[task]
                found[f"update_ratio/{task}"] = self._updates[task] / norm
            found[f"prompt_norm/{task}"] = norm
            found[f"token_similarity/{task}"] = statistics.token_similarity(prompt)
            found[f"effective_rank/{task}"] = statistics.effective_rank(prompt)
            found[f"vocabulary_distance/{task}"] = statistics.vocabulary_distance(prompt, band.to(prompt.device))
        found[f"grad_norm/{TOTAL}"] = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        if len(self._prompts) > 1:
            similarities = statistics.task_similarities(list(self._prompts.values()))
            found["task_similarity"] = statistics.mean_of_pairs(similarities)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


def _gradient_norm(prompt: nn.Parameter) -> Tensor:
    return prompt.new_zeros(()) if prompt.grad is None else torch.linalg.vector_norm(prompt.grad)
