"""Draws `docs/mixed_batch.svg`, the picture of a mixed batch: `python docs/mixed_batch.py`.

Where each cell stands is what `prompt_concat`, which lays out the rows of every batch, says of these rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyArrow, FancyBboxPatch
from softprompt_kernels import prompt_concat

TARGET = Path(__file__).with_suffix(".svg")
# The tasks, in the order of the prompts: how long is each, and its colour (Okabe and Ito's, told apart by everybody).
TASKS = {"sentiment": (4, "#0072B2"), "source": (2, "#E69F00"), "strength": (3, "#009E73")}
ROWS = [
    ("sentiment", "The zip broke at once .", "negative"),
    ("source", "The zip broke at once .", "product"),
    ("strength", "Not bad .", "mild"),
    (None, "Once upon a", "time"),
]
INK, TEXT, PAD = "#222222", "#E8E8E8", "#9A9A9A"


def main(target: Path = TARGET) -> None:
    """Draw the batch."""
    columns = layout()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mixed batch", "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(figsize=(10, 3.1))
        for row, (task, _, answer) in enumerate(ROWS):
            height = len(ROWS) - row
            axes.text(-0.3, height, task or "no task", ha="right", va="center", color=INK, fontsize=12)
            for column, (kind, word) in enumerate(columns[row]):
                draw_cell(axes, column, height, kind, word, task)
            axes.text(len(columns[0]) + 3.1, height, answer, va="center", color=INK, fontsize=12)
        draw_model(axes, len(columns[0]))
        draw_legend(axes)
        axes.set(xlim=(-1.9, len(columns[0]) + 4.8), ylim=(-0.35, len(ROWS) + 0.6), aspect="equal")
        axes.axis("off")
        figure.savefig(target, bbox_inches="tight", pad_inches=0.05, facecolor="white", metadata={"Date": None})
        pyplot.close(figure)


def layout() -> list[list[tuple[str, str]]]:
    """Of each row its columns: what stands there ("pad", "prompt" or "text"), and the word of a text."""
    words = [text.split() for _, text, _ in ROWS]
    length, offsets = max(map(len, words)), [0]
    for size, _ in TASKS.values():
        offsets.append(offsets[-1] + size)
    # One number a cell: words count up from 1, prompts are -1, and pads stay 0.
    ids = torch.tensor([[0] * (length - len(each)) + list(range(1, len(each) + 1)) for each in words])
    out = prompt_concat(
        torch.arange(length + 1.0)[:, None],
        ids,
        torch.full((offsets[-1], 1), -1.0),
        torch.tensor(offsets),
        torch.tensor([list(TASKS).index(task) if task else -1 for task, _, _ in ROWS]),
        (ids > 0).long(),
        padding_side="left",
        max_prompt_length=max(size for size, _ in TASKS.values()),
    )
    kinds = {0: "pad", -1: "prompt"}
    return [
        [(kinds.get(int(cell), "text"), each[int(cell) - 1] if cell > 0 else "") for cell in row[:, 0]]
        for row, each in zip(out.inputs_embeds, words, strict=True)
    ]


def draw_cell(axes: pyplot.Axes, column: float, height: float, kind: str, word: str, task: str | None) -> None:
    """A column of a row."""
    if kind == "prompt":
        style = {"facecolor": TASKS[task][1], "edgecolor": INK}
    elif kind == "text":
        style = {"facecolor": TEXT, "edgecolor": INK}
    else:
        style = {"facecolor": "white", "edgecolor": PAD, "linestyle": "dotted"}
    box = FancyBboxPatch((column + 0.06, height - 0.36), 0.88, 0.72, "round,pad=0,rounding_size=0.1", lw=0.9, **style)
    axes.add_patch(box)
    axes.text(column + 0.5, height - 0.02, word, ha="center", va="center", color=INK, fontsize=10)


def draw_model(axes: pyplot.Axes, width: int) -> None:
    """The frozen model, which all rows go into, and their answers come out of."""
    middle = (len(ROWS) + 1) / 2
    for start in (width + 0.1, width + 2.25):
        axes.add_patch(FancyArrow(start, middle, 0.42, 0, width=0.08, head_width=0.35, head_length=0.25, color=INK))
    style = {"facecolor": "white", "edgecolor": INK, "lw": 1.4}
    corner, shape = (width + 0.85, 0.6), "round,pad=0,rounding_size=0.2"
    axes.add_patch(FancyBboxPatch(corner, 1.2, len(ROWS) - 0.2, shape, **style))
    axes.text(width + 1.45, middle, "one frozen\ncausal LM", ha="center", va="center", rotation=90, fontsize=12)


def draw_legend(axes: pyplot.Axes) -> None:
    """What the cells are."""
    left = 0.0
    for index, (_, colour) in enumerate(TASKS.values()):
        style = {"facecolor": colour, "edgecolor": INK, "lw": 0.8}
        axes.add_patch(FancyBboxPatch((left + 0.3 * index, -0.2), 0.25, 0.25, "square,pad=0", **style))
    axes.text(left + 1.05, -0.09, "virtual tokens, which train", va="center", color=INK, fontsize=10)
    for start, words, colour, line in ((5.6, "text", TEXT, "solid"), (7.2, "pads", "white", "dotted")):
        style = {"facecolor": colour, "edgecolor": INK if line == "solid" else PAD, "linestyle": line, "lw": 0.8}
        axes.add_patch(FancyBboxPatch((start, -0.2), 0.25, 0.25, "square,pad=0", **style))
        axes.text(start + 0.4, -0.09, words, va="center", color=INK, fontsize=10)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
