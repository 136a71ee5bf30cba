"""The site: it can be built, and every link of its pages leads to what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat

from tests.integration.pages import NOTEBOOK, PAGES, ROOT


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_what_there_is() -> None:
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    notebook = nbformat.read(NOTEBOOK, 4)
    texts["examples/three_tasks.ipynb"] = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    seen = 0
    for page, text in texts.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), (page, target)
            if anchor and not anchor.startswith(
                "lightning_softprompt"
            ):  # those of the reference are made with the site
                assert anchor in anchors_of(path), (page, target, anchor)
            seen += 1
    assert seen > 40


def test_the_site_can_be_built(tmp_path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "docs" / "api" / "index.html").read_text()
    import lightning_softprompt

    for name in lightning_softprompt.__all__:
        assert f'id="lightning_softprompt.{name}"' in page, name
    assert (tmp_path / "site" / "index.html").is_file()
    assert "Two more tasks" in (tmp_path / "site" / "examples" / "three_tasks" / "index.html").read_text()
