"""Gives the site the layout of the repository, so that a link in a page leads to the same place in both."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

_PAGES = ["*.md", "docs/**/*.md", "kernels/*.md", "integrations/*/*.md", "benchmarks/results/*.md", "examples/*.ipynb"]
_LINKED = [
    "LICENSE",
    "docs/*.css",
    "docs/*.js",
    "docs/**/*.png",
    "docs/**/*.svg",
    "benchmarks/**/*.png",
    "benchmarks/*.py",
    "examples/*.yaml",
    "tests/**/*.py",
]


@event_priority(100)  # before the plugin that takes notebooks for pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages, and what they link to, under their paths in the repository."""
    root = Path(config.config_file_path).parent
    paths = sorted(path for pattern in (*_PAGES, *_LINKED) for path in root.glob(pattern))
    ours = [
        File(path.relative_to(root).as_posix(), str(root), config.site_dir, config.use_directory_urls) for path in paths
    ]
    theirs = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*ours, *theirs])
