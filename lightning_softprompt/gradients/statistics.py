"""What is measured of gradients and prompts around one step of the optimizer. A new statistic goes into `values`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_softprompt.prompts import statistics

TOTAL = "total"


@dataclass
class StepStatistics:
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
