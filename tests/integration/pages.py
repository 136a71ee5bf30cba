"""The pages that are written for readers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "three_tasks.ipynb"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "kernels/*.md", "integrations/*/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page that are of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: str) -> list[list[str]]:
    """The commands of a page, each as its words."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]
