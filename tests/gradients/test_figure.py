"""The figure of a run's health, read back from its axes."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_softprompt import CollapseGuard, PromptGradientClipping, PromptGradientNorm, SoftPromptError
from lightning_softprompt.gradients.figure import draw
from tests.gradients.recorded_runs import NAMES, Weighted, run


def test_the_figure_shows_every_task_clips_and_events(tmp_path) -> None:
    monitor, guard = PromptGradientNorm(every_n_steps=1), CollapseGuard()
    module = Weighted({(2, "beta"): math.nan})
    run(tmp_path, module, monitor, guard, PromptGradientClipping(1e-2))
    figure = monitor.plot()
    figure.savefig(tmp_path / "health.png")
    norms, prompt_norms, updates, likeness, _ = figure.axes
    assert [line.get_label() for line in norms.get_lines()] == NAMES
    assert len(prompt_norms.get_lines()) == len(NAMES) + 1  # and the event
    assert [label.get_text() for label in likeness.get_xticklabels()] == NAMES
    clipped = [len(points.get_offsets()) for points in norms.collections[: len(NAMES)]]
    assert clipped == [4, 3, 4]  # beta's third step was skipped
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in (norms, prompt_norms, updates))
    with pytest.raises(SoftPromptError, match=r"after trainer\.fit"):
        PromptGradientNorm().plot()


def test_no_place_of_the_figure_is_empty() -> None:
    """A history that a checkpoint brought has no prompts yet, and an optimizer without hooks has no updates."""
    history = {"grad_norm/a": [(0, 3.0), (1, 4.0)], "prompt_norm/a": [(0, 1.0), (1, 1.5)]}
    updates = {"update_ratio/a": [(0, 0.0), (1, 0.5), (2, 1e-3)]}
    for found, prompts, count in ((history, {}, 2), (history | updates, {}, 3), (history, {"a": torch.ones(2, 3)}, 3)):
        figure = draw(found, [], prompts)
        panels = [
            axis for axis in figure.axes if axis.get_label() in ("grad_norm", "prompt_norm", "update_ratio", "likeness")
        ]
        assert len(panels) == count and all(axis.has_data() for axis in panels)
        columns = sum(len(axis.get_subplotspec().colspan) for axis in panels)
        assert columns == 2 * -(-count // 2)


def test_numbers_on_the_axes_are_plain_and_a_step_left_out_is_a_gap() -> None:
    wide = [(step, 10.0**-step) for step in range(7)]
    history = {"grad_norm/a": wide, "prompt_norm/a": [(0, 9.0), (4, 10.5)], "update_ratio/a": [(0, 0.0), *wide[1:]]}
    figure = draw(history, [], {})
    figure.canvas.draw()
    norms, prompt_norms, updates = figure.axes
    assert norms.get_yscale() == "log" and prompt_norms.get_yscale() == "linear"
    for axis in figure.axes:
        ticks = [label.get_text() for label in axis.get_yticklabels(which="both")]
        assert any(ticks) and not [text for text in ticks if "$" in text or "e" in text or len(text) > 12], ticks
    assert math.isnan(updates.get_lines()[0].get_ydata()[0])
