"""What the project's figures have in common: a style, and what tells tasks apart."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

_DASHES = ("-", "--", ":", "-.")


def style() -> AbstractContextManager[Any]:
    """The style of `style.mplstyle`. Make a figure and draw in it inside of this context."""
    import matplotlib.style

    return matplotlib.style.context("lightning_softprompt.style")


def looks(number: int) -> dict[str, Any]:
    """The colour and the dashes of the task with that number; colours come again with other dashes.

    Example:
        >>> looks(0)
        {'color': '#0072B2', 'linestyle': '-'}
        >>> looks(7)
        {'color': '#0072B2', 'linestyle': '--'}
    """
    with style():
        import matplotlib

        # By value: a name such as C0 is looked up when the figure is saved, outside of the style.
        colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    around, place = divmod(number, len(colors))
    return {"color": f"#{colors[place].lstrip('#')}", "linestyle": _DASHES[around % len(_DASHES)]}
