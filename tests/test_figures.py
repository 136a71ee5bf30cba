"""Colours that people who see red and green alike can tell apart, and figures that keep them when they are saved."""

from __future__ import annotations

import io
import itertools

import matplotlib
import numpy
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lightning_softprompt.figures import looks, style

# Machado, Oliveira and Fernandes 2009, doi 10.1109/TVCG.2009.113: what the colour-blind see, of linear RGB.
SIGHTS = {
    "all colours": numpy.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
XYZ = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen(color: str, sight: str) -> numpy.ndarray:
    """A colour in CIELAB, where distances are as people see them, as that sight sees it."""
    rgb = numpy.array(to_rgb(color))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ numpy.clip(numpy.array(SIGHTS[sight]) @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return numpy.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def closest(colors: list[str]) -> float:
    pairs = list(itertools.combinations(colors, 2))
    return min(numpy.linalg.norm(seen(a, sight) - seen(b, sight)) for sight in SIGHTS for a, b in pairs)


def test_the_colors_are_told_apart() -> None:
    assert closest([looks(number)["color"] for number in range(7)]) > 12
    assert closest([f"C{number}" for number in range(7)]) < 12  # those that matplotlib has


def test_no_two_of_many_tasks_look_alike() -> None:
    assert len({tuple(looks(number).values()) for number in range(28)}) == 28


def test_a_figure_keeps_its_colors_when_it_is_saved_outside_of_the_style() -> None:
    before = dict(matplotlib.rcParams)
    with style():
        figure = Figure(figsize=(1, 1), layout="none")
        figure.add_axes((0, 0, 1, 1)).plot([0, 1], [0, 1], linewidth=50, **looks(1))
    assert dict(matplotlib.rcParams) == before
    saved = io.BytesIO()
    figure.savefig(saved)
    assert Image.open(saved).convert("RGB").getpixel((45, 52)) == (0xD5, 0x5E, 0x00)
