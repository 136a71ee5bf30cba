"""The README: its example runs as it stands, its picture is drawn, and it stays short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from lightning_softprompt import SoftPrompts
from tests.integration.pages import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
BASE = '"HuggingFaceTB/SmolLM2-135M-Instruct"'  # in the example, where a model of the suite takes its place
MOST_WORDS, MOST_LINES = 900, 40


def prose(page: str) -> list[str]:
    """The words of a page outside of code, tables and pictures; of a link, those that are read."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text).split()


def test_words_are_those_that_are_read() -> None:
    page = "Two words.\n\n```python\nmuch = code\n```\n\n| a | table |\n\n![a drawing](of.png) [One more](x.it)."
    assert prose(page) == ["Two", "words.", "[One", "more]."]


def test_it_is_short() -> None:
    assert 300 < len(prose(README)) <= MOST_WORDS


@pytest.mark.filterwarnings("ignore")
def test_its_example_runs_as_it_stands(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line]) <= MOST_LINES
    assert example.count(BASE) == 1
    names: dict = {}
    exec(compile(example.replace(BASE, repr(str(tiny_base))), "README.md", "exec"), names)
    saved = SoftPrompts.from_pretrained("prompts")
    assert saved.tasks == ("source", "opinion") and saved.lengths[1] == 12
    assert saved.templates["source"].labels == [" film", " product"]
    batch = names["collate"](names["ROWS"])
    decoded = [names["tokenizer"].decode(ids[ids != -100]).strip() for ids in batch["labels"]]
    assert decoded == [label for _, _, label in names["ROWS"]]  # what is trained on is the answer, and all of it
    assert 0 < float(names["trainer"].progress_bar_metrics["loss"]) < 10  # somebody who looks on sees it fall
    answers = names["generator"].answer(["a film"] * 2, tasks=["source", "opinion"])
    assert answers[0] in ("film", "product") and answers[1] in ("good", "bad") and not answers.failures


@pytest.mark.parametrize("page", ["README.md", "docs/exactness.md"])
def test_it_quotes_the_page_of_models(page: str) -> None:
    models, text = (" ".join((ROOT / name).read_text().split()) for name in ("docs/models.md", page))
    types, built, forward, generation, refused = re.search(
        r"Of (\d+) types, (\d+) can .* exact on (\d+), gradients .* generation on (\d+); (\d+) are refused", models
    ).groups()
    assert f"all {types} types" in text
    assert re.search(rf"(Of {built} that|5.23, {built}) can be built", text)
    assert f"forward passes are exact on {forward} and greedy generation on {generation}; {refused} are refused" in text


# ---------------------------------------------------------------- the picture

PICTURE = ROOT / "docs" / "mixed_batch.py"


def test_the_picture_is_what_its_script_draws(tmp_path) -> None:
    def content(path: Path) -> tuple[list[str], list[str]]:  # places vary with the fonts of a machine
        svg = path.read_text(encoding="utf-8")
        return re.findall(r">([^<>]+)</text>", svg), re.findall(r"fill: (#\w{6})", svg)

    runpy.run_path(str(PICTURE))["main"](tmp_path / "drawn.svg")
    words, colours = content(tmp_path / "drawn.svg")
    assert (words, colours) == content(PICTURE.with_suffix(".svg"))
    assert "negative" in words and len(set(colours)) > 4


def test_the_picture_shows_a_batch_as_it_is_laid_out() -> None:
    module = runpy.run_path(str(PICTURE))
    rows = ["".join({"pad": ".", "prompt": "p", "text": "t"}[kind] for kind, _ in row) for row in module["layout"]()]
    assert rows == ["pppptttttt", "..pptttttt", "....pppttt", ".......ttt"]
    assert [" ".join(word for _, word in row).split() for row in module["layout"]()] == [
        text.split() for _, text, _ in module["ROWS"]
    ]
