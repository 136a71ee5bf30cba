"""The pages that are written for readers."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "three_tasks.ipynb"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "kernels/*.md", "integrations/*/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)
