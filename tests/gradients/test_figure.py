"""The figure of a run's health, read back from its axes."""

from __future__ import annotations

import math

import pytest

from lightning_softprompt import CollapseGuard, PromptGradientClipping, PromptGradientNorm, SoftPromptError
from tests.gradients.recorded_runs import NAMES, Weighted, run


def test_the_figure_shows_every_task_clips_and_events(tmp_path) -> None:
    monitor, guard = PromptGradientNorm(every_n_steps=1), CollapseGuard()
    module = Weighted({(2, "beta"): math.nan})
    run(tmp_path, module, monitor, guard, PromptGradientClipping(1e-2))
    figure = monitor.plot()
    figure.savefig(tmp_path / "health.png")
    norms, prompt_norms, _, likeness, _ = figure.axes
    assert [line.get_label() for line in norms.get_lines()] == NAMES
    assert len(prompt_norms.get_lines()) == len(NAMES) + 1  # and the event
    assert [label.get_text() for label in likeness.get_xticklabels()] == NAMES
    clipped = [len(points.get_offsets()) for points in norms.collections[: len(NAMES)]]
    assert clipped == [4, 3, 4]  # beta's third step was skipped
    with pytest.raises(SoftPromptError, match=r"after trainer\.fit"):
        PromptGradientNorm().plot()
