"""The statistics of gradients and prompts in one step of the optimizer. A new statistic is added in `values`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_softprompt.prompts import statistics

TOTAL = "total"


@dataclass
class StepStatistics:
    """The measurements of one step. They stay on the device until `values` copies all of them at once."""

    step: int
    tasks: dict[str, nn.Parameter] = field(default_factory=dict)
    _norms: dict[str, Tensor] = field(default_factory=dict)
    _clipped: dict[str, Tensor] = field(default_factory=dict)
    _prompts: dict[str, Tensor] = field(default_factory=dict)
    _updates: dict[str, Tensor] = field(default_factory=dict)

    def before(self, tasks: dict[str, nn.Parameter]) -> None:
        """Measure the norms of the gradients and copy the prompts, before the step changes them."""
        self.tasks.update(tasks)
        for task in tasks:  # results of an earlier step in the same batch
            self._clipped.pop(task, None)
            self._updates.pop(task, None)
        self._norms.update({task: _gradient_norm(prompt) for task, prompt in tasks.items()})
        self._prompts.update({task: prompt.detach().clone() for task, prompt in tasks.items()})

    def after(self) -> None:
        """Measure the norms of the gradients that the optimizer used, and of the changes that it made."""
        for task, prompt in self.tasks.items():
            if task not in self._clipped:
                self._clipped[task] = _gradient_norm(prompt)
                self._updates[task] = torch.linalg.vector_norm(prompt.detach() - self._prompts[task])

    def values(self, band: Tensor) -> dict[str, float]:
        """Everything that is logged, by name; `band` is the result of `norm_band`, `[3]`."""
        found: dict[str, Tensor] = {}
        for task, prompt in self._prompts.items():
            norm = torch.linalg.vector_norm(prompt)
            found[f"grad_norm/{task}"] = self._norms[task]
            if task in self._clipped:  # not if the scaler of precision "16-mixed" has skipped the step
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
