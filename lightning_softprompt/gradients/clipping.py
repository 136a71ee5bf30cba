"""`PromptGradientClipping`: clip the gradient of each task's prompt separately, or give it one norm in every step."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.gradients.limits import LEAST_WEIGHT_NORM, WEIGHT_RATIO, AutoClip, ZClip
from lightning_softprompt.gradients.stage import GradientStage, about_to_move
from lightning_softprompt.transfer import to_device

_HISTORIES: dict[str, type[AutoClip] | type[ZClip]] = {"percentile": AutoClip, "zscore": ZClip}
Method = Literal["norm", "normalized", "value", "percentile", "zscore", "agc"]
Scope = Literal["task", "global", "token"]


class PromptGradientClipping(GradientStage):
    """Clip the gradients of the prompts before each step of an optimizer.

    With the Trainer's own `gradient_clip_val`, all tasks share one norm: a task whose gradient is a thousand times
    larger makes the steps of the others a thousand times smaller, and one gradient that is not finite spoils all. Here
    each task is clipped separately. Gradients that are not finite are not changed and do not count in any norm;
    `CollapseGuard` drops them. Parameters other than the prompts are not clipped.

    Args:
        max_norm: the largest norm or, with method "value", the largest magnitude of an entry. With "percentile" and
            "zscore", the smaller of this and the method's own limit applies; with "agc" it is not used.
        method: how the limit is found. "norm" and "value": it is `max_norm`. "normalized": so it is, and smaller norms
            grow to it, too, so that every step weighs the same (arXiv 1507.02030). Adam's moments then do not remember
            the large gradients of the first steps, and the scale of the loss changes nothing. "percentile": AutoClip,
            the 10th percentile of all norms so far (arXiv 2007.14469), all of which are kept in memory. "zscore":
            ZClip, which after 25 steps lowers norms that are more than 2.5 standard deviations above the moving mean
            (arXiv 2504.02507). "agc": a hundredth of the prompt's own norm (arXiv 2102.06171, which does this for each
            row of a weight, as scope "token" does).
        scope: which norm is limited: "task", that of each prompt; "token", that of each virtual token; "global", that
            of all tasks of the step together. Not used with method "value".

    Raises:
        SoftPromptError: in setup, if the Trainer clips gradients, too; before a step, if the optimizer unscales its
            gradients only inside the step (precision "16-mixed" with a fused optimizer).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_softprompt import PromptGradientClipping, SoftPromptCallback
        >>> callbacks = [SoftPromptCallback(tasks={"topic": 20}), PromptGradientClipping(max_norm=1.0)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    order = 2

    def __init__(self, max_norm: float = 1.0, method: Method = "norm", scope: Scope = "task") -> None:
        super().__init__()
        if not max_norm > 0:
            raise SoftPromptError(f"max_norm must be a number above 0, got {max_norm!r}")
        check_choice("method", method, Method)
        check_choice("scope", scope, Scope)
        self.max_norm = float(max_norm)
        self.method = method
        self.scope = scope
        self._limits: dict[str, AutoClip | ZClip] = {}

    def forget(self) -> None:
        """Forget the past norms."""
        self._limits = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise a `SoftPromptError` if the Trainer would clip the gradients, too."""
        if trainer.gradient_clip_val:
            raise SoftPromptError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and PromptGradientClipping would both clip, "
                "the former by one norm over all tasks; set gradient_clip_val to None (in a config: null)"
            )
        super().setup(trainer, pl_module, stage)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip the gradients of the prompts that the optimizer is about to change, in place."""
        self.check_gradients_are_unscaled(trainer, optimizer)
        self.clip(about_to_move(optimizer, self.attachment(pl_module).prompts))

    @torch.no_grad()
    def clip(self, prompts: dict[str, nn.Parameter]) -> None:
        """Clip the gradients of `prompts`, which are given by task, in place."""
        gradients = {task: prompt.grad for task, prompt in prompts.items() if prompt.grad is not None}
        if not gradients:
            return
        if self.method == "value":
            for gradient in gradients.values():
                gradient.clamp_(-self.max_norm, self.max_norm)  # NaN stays NaN
            return
        finite = {task: torch.linalg.vector_norm(gradient).isfinite() for task, gradient in gradients.items()}
        norms = self._norms(gradients, finite)
        limits = self._limits_of(norms, {task: prompts[task].detach() for task in gradients}, finite)
        for task, gradient in gradients.items():
            name = "" if self.scope == "global" else task
            is_finite = norms[name].isfinite() if self.scope == "token" else finite[task]
            least = 0 if self.method == "normalized" else limits[name]
            factor = torch.where(is_finite & (norms[name] > least), limits[name] / norms[name], 1)
            gradient.mul_(factor[:, None] if self.scope == "token" else factor)

    def state_dict(self) -> dict[str, Any]:
        """The past norms from which limits are computed."""
        return {"method": self.method, "limits": {name: asdict(limit) for name, limit in self._limits.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the past norms of the saved run. A run with another method starts anew; some methods need none."""
        history = _HISTORIES.get(self.method)
        if history is not None and state_dict.get("method", self.method) == self.method:
            self._limits = {name: history(**state) for name, state in state_dict["limits"].items()}

    def _norms(self, values: dict[str, Tensor], finite: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms that the scope asks for, by name.

        They are a scalar for each task, or `[length]` for each task with one norm per token, or one scalar under the
        name "" over all tasks whose gradient is finite.
        """
        if self.scope == "token":
            return {task: torch.linalg.vector_norm(value, dim=1) for task, value in values.items()}
        norms = dict(zip(values, torch._foreach_norm(list(values.values())), strict=True))
        if self.scope == "task":
            return norms
        counted = [torch.where(finite[task], norm, 0) for task, norm in norms.items()]
        return {"": torch.linalg.vector_norm(torch.stack(counted))}

    def _limits_of(
        self, norms: dict[str, Tensor], weights: dict[str, Tensor], finite: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """How large each of the norms may be, in the shape of the norms."""
        if self.method == "agc":
            weight_norms = self._norms(weights, finite)
            return {name: WEIGHT_RATIO * norm.clamp(min=LEAST_WEIGHT_NORM) for name, norm in weight_norms.items()}
        limits = {name: torch.full_like(norm, self.max_norm) for name, norm in norms.items()}
        if self.method in ("norm", "normalized"):
            return limits
        flat = torch.cat([norm.reshape(-1) for norm in norms.values()])
        keys = [key for name, norm in norms.items() for key in _keys(name, norm)]
        found = [self._next(key, norm) for key, norm in zip(keys, flat.tolist(), strict=True)]
        (drawn,) = to_device(flat.device, found, dtype=flat.dtype)
        parts = drawn.split([norm.numel() for norm in norms.values()])
        return {
            name: torch.minimum(limits[name], part.view_as(limits[name]))
            for name, part in zip(limits, parts, strict=True)
        }

    def _next(self, key: str, norm: float) -> float:
        if not 0 < norm < math.inf:
            return math.inf
        if key not in self._limits:
            self._limits[key] = _HISTORIES[self.method]()
        return self._limits[key].next(norm)


def _keys(name: str, norm: Tensor) -> list[str]:
    """The names under which the past values of a norm, or of each token's norm, are kept. Task names hold no slash."""
    return [name] if norm.ndim == 0 else [f"{name}/{token}" for token in range(len(norm))]
