"""The site: it can be built, and every link of its pages leads to what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup

import lightning_softprompt
from lightning_softprompt.cli.main import ROOMS, function_of
from tests.integration.pages import NOTEBOOK, PAGES, ROOT, blocks


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


def test_the_site_can_be_built(site) -> None:
    page = (site / "docs" / "api.html").read_text()
    for name in lightning_softprompt.__all__:
        assert f'id="lightning_softprompt.{name}"' in page, name
    assert (site / "index.html").is_file()
    assert "Two more tasks" in (site / "examples" / "three_tasks.html").read_text()


def test_examples_are_code_and_not_quotations(site) -> None:
    pages = {path: path.read_text() for path in (site / "docs").glob("*.html")}
    assert len(pages) > 10
    assert [path.name for path, text in pages.items() if "<blockquote" in text] == []
    api = BeautifulSoup(pages[site / "docs" / "api.html"], "html.parser")
    prompts = [code for code in api.select("pre code") if ">>> " in code.get_text()]
    documented = inspect.getdoc(lightning_softprompt.SoftPrompts)
    assert len(prompts) > 15 and ">>> prompts.tasks, prompts" in documented
    assert any(">>> prompts.tasks, prompts" in code.get_text() for code in prompts)


def test_tables_have_headers(site) -> None:
    count = 0
    for path in site.rglob("*.html"):
        for table in BeautifulSoup(path.read_text(), "html.parser").select(".md-content table:not(.dataframe)"):
            first, *others = [cell.get_text(strip=True) for cell in table.select("thead th")]
            assert all(others) if others else first, (path.relative_to(site), first, others)
            count += 1
    assert count > 40


def test_commands_are_shown_as_commands(site) -> None:
    page = BeautifulSoup((site / "docs" / "commands.html").read_text(), "html.parser")
    usages = [" ".join(code.get_text().split()) for code in page.select(".doc-command pre code")]
    for command in ROOMS.keys() - {"fit", "validate", "test", "predict", "completion"}:
        (usage,) = [line for line in usages if line.split()[1] == command]
        arguments = inspect.signature(function_of(command)).parameters
        required = [name for name, argument in arguments.items() if argument.default is argument.empty]
        assert re.findall(r"--(\w+)", usage) == required, command
        (section,) = [part for part in page.select(".doc-command") if part.select_one("h3").code.get_text() == command]
        told = [cell.get_text() for cell in section.select("td:first-child code")]
        assert told == [f"--{name}" for name in arguments], command
    assert "Python" not in page.select_one("h1").get_text() and not page.select(".doc-signature")


def test_diagrams_are_pictures_and_not_scripts(site) -> None:
    page = BeautifulSoup((site / "docs" / "hooks.html").read_text(), "html.parser")
    drawn = page.select("figure.diagram > svg")
    assert len(drawn) == len(blocks("docs/hooks.md", "mermaid")) > 0 and not page.select("pre.mermaid")
    assert len({picture["id"] for picture in drawn}) == len(drawn)
    assert "on_before_optimizer_step" in drawn[0].get_text()
