"""The figure that `PromptGradientNorm.plot` draws of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_softprompt.gradients.events import Event
from lightning_softprompt.prompts.inspection import draw_likeness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
_MARKERS = {"nonfinite": "X", "spike": "^", "collapse": "s"}


def draw(history: Mapping[str, Points], events: Sequence[Event], prompts: Mapping[str, Tensor]) -> Figure:
    """Draw gradient norms, prompt norms and updates over the steps, and a heat map of how alike the tasks are.

    Args:
        history: the points `(step, value)` of each name that `PromptGradientNorm` logs.
        events: the events of `CollapseGuard`.
        prompts: the current prompts, `[length, hidden]`, by task.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    tasks = [name.removeprefix("prompt_norm/") for name in history if name.startswith("prompt_norm/")]
    for number, task in enumerate(tasks):
        style = {"color": f"C{number % 10}", "label": task}
        _draw_norms(axes[0, 0], task, history, style)
        axes[0, 1].plot(*_columns(history[f"prompt_norm/{task}"]), **style)
        if f"update_ratio/{task}" in history:
            axes[1, 0].plot(*_columns(history[f"update_ratio/{task}"]), **style)
    axes[0, 0].scatter([], [], marker="v", facecolors="none", edgecolors="black", label="clipped")
    for seen, marker in _MARKERS.items():
        happened = [event for event in events if event.seen == seen]
        for event in happened:
            color = f"C{tasks.index(event.task) % 10}" if event.task in tasks else "black"
            axes[0, 1].axvline(event.step, color=color, alpha=0.3, linewidth=1)
        if happened:
            steps, on_the_axis = [event.step for event in happened], axes[0, 0].get_xaxis_transform()
            floor = [0.0] * len(steps)
            axes[0, 0].scatter(steps, floor, transform=on_the_axis, marker=marker, color="black", label=seen, zorder=3)
    titles = ("gradient norm before clipping", "prompt norm (lines: events)", "update over prompt norm")
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set(title=title, xlabel="step")
        axis.set_yscale("log")
    axes[0, 0].legend(fontsize="small")
    draw_likeness(axes[1, 1], figure, prompts)
    return figure


def _draw_norms(axis: Any, task: str, history: Mapping[str, Points], style: dict[str, Any]) -> None:
    steps, norms = _columns(history[f"grad_norm/{task}"])
    axis.plot(steps, norms, **style)
    after = dict(history.get(f"grad_norm_clipped/{task}", ()))
    clipped = [
        (step, norm) for step, norm in zip(steps, norms, strict=True) if 0 < after.get(step, norm) < 0.999 * norm
    ]
    axis.scatter(*_columns(clipped), marker="v", facecolors="none", edgecolors=style["color"])


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
