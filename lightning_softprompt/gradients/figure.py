"""The figure that `PromptGradientNorm.plot` draws of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy import format_float_positional
from torch import Tensor

from lightning_softprompt.figures import looks, style
from lightning_softprompt.gradients.events import Event
from lightning_softprompt.prompts.inspection import draw_likeness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
_MARKERS = {"nonfinite": "X", "spike": "^", "collapse": "s"}
_TITLES = {"grad_norm": "gradient, before clipping", "prompt_norm": "prompt", "update_ratio": "update over prompt"}
_WIDE = 20  # values that are so many times as large as others stand on a logarithmic axis


def draw(history: Mapping[str, Points], events: Sequence[Event], prompts: Mapping[str, Tensor]) -> Figure:
    """Draw gradient norms, prompt norms and updates over the steps, and a heat map of how alike the tasks are.

    What a history does not have, such as prompts before a run has begun, gets no place in the figure.

    Args:
        history: the points `(step, value)` of each name that `PromptGradientNorm` logs.
        events: the events of `CollapseGuard`.
        prompts: the current prompts, `[length, hidden]`, by task.
    """
    from matplotlib.figure import Figure

    tasks = [name.removeprefix("prompt_norm/") for name in history if name.startswith("prompt_norm/")]
    kinds = [kind for kind in _TITLES if any(f"{kind}/{task}" in history for task in tasks)]
    panels = [*kinds, "likeness"] if prompts else kinds
    with style():
        figure = Figure(figsize=(12, 3.6 * math.ceil(len(panels) / 2)))
        rows = [panels[first : first + 2] for first in range(0, len(panels), 2)]
        mosaic: list[Any] = [row * (2 // len(row)) for row in rows]
        axes = figure.subplot_mosaic(mosaic)
        for kind in kinds:
            _draw_values(axes[kind], kind, tasks, history)
        _draw_clipped(axes["grad_norm"], tasks, history)
        _draw_events(axes, events, tasks)
        axes["grad_norm"].legend(ncols=2)
        if prompts:
            draw_likeness(axes["likeness"], figure, prompts)
    return figure


def _draw_values(axis: Any, kind: str, tasks: Sequence[str], history: Mapping[str, Points]) -> None:
    drawn = []
    for number, task in enumerate(tasks):
        steps, values = _columns(history.get(f"{kind}/{task}", ()))
        # A step that was left out has an update of 0, and a gap in place of a fall to the end of a logarithmic axis.
        shown = [value if value > 0 else math.nan for value in values]
        axis.plot(steps, shown, label=task, **looks(number))
        drawn += [value for value in shown if math.isfinite(value)]
    axis.set(title=_TITLES[kind], xlabel="step", ylabel="ratio of L2 norms" if kind == "update_ratio" else "L2 norm")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if drawn and max(drawn) > _WIDE * min(drawn):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain)
        axis.yaxis.set_minor_formatter("")
    else:
        axis.ticklabel_format(axis="y", useOffset=False, style="plain")


def _plain(value: float, place: int) -> str:
    """A number without an exponent. A power of ten of a logarithmic axis may be one digit of sixteen below itself."""
    return format_float_positional(value, precision=3, fractional=False, trim="-")


def _draw_clipped(axis: Any, tasks: Sequence[str], history: Mapping[str, Points]) -> None:
    """A mark on each gradient that was clipped."""
    every: list[tuple[int, float]] = []
    for number, task in enumerate(tasks):
        after = dict(history.get(f"grad_norm_clipped/{task}", ()))
        norms = history[f"grad_norm/{task}"]
        clipped = [(step, norm) for step, norm in norms if 0 < after.get(step, norm) < 0.999 * norm]
        every += clipped
        axis.scatter(*_columns(clipped), marker="v", s=18, facecolors="none", edgecolors=looks(number)["color"])
    if every:
        axis.scatter([], [], marker="v", s=18, facecolors="none", edgecolors="black", label="clipped")


def _draw_events(axes: Mapping[str, Any], events: Sequence[Event], tasks: Sequence[str]) -> None:
    """What the guard saw: a mark below the gradients, and a line through the prompts of the task."""
    for seen, marker in _MARKERS.items():
        steps = [event.step for event in events if event.seen == seen]
        if steps:
            axis = axes["grad_norm"]
            on_the_axis = {"transform": axis.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            axis.scatter(steps, [0.0] * len(steps), marker=marker, color="black", label=seen, **on_the_axis)
    for event in events:
        color = looks(tasks.index(event.task))["color"] if event.task in tasks else "black"
        axes["prompt_norm"].axvline(event.step, color=color, alpha=0.5, linewidth=1)
    if events:
        axes["prompt_norm"].set_title(f"{_TITLES['prompt_norm']} (lines: what the guard saw)")


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
