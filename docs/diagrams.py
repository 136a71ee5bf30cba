"""Diagrams are drawn when the site is built, by Mermaid itself, so that a reader needs no network and no script."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import mermaidx


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **more: Any) -> str:
    """The picture of a `mermaid` block, for `pymdownx.superfences`."""
    drawn = mermaidx.render(source).svg()
    # It grows and shrinks with the window, but stays large enough to be read: then its box is what moves.
    drawn = re.sub(
        r"max-width: (\d+)\S*px", lambda found: f"{found[0]}; min-width: {int(found[1]) // 2}px", drawn, count=1
    )
    # Every picture comes with the same id, by which its styles and its arrows are found. A page may hold several.
    name = "diagram-" + hashlib.sha256(source.encode()).hexdigest()[:8]
    return f'<figure class="diagram">{drawn.replace("my-svg", name)}</figure>'
