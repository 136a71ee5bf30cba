"""The notebook: it runs from its first cell to its last, and was run as it stands."""

from __future__ import annotations

import os

import nbformat
from nbclient import NotebookClient

from lightning_softprompt import (
    SoftPrompts,
)
from tests.integration.pages import NOTEBOOK, ROOT

TEXTS = """
import itertools, json
from pathlib import Path

def prepare_texts(cache):
    words = (["positive", "negative"], ["film", "product", "news", "tweet"], ["mild", "strong"])
    columns = ("text", "sentiment", "source", "strength")
    rows = [dict(zip(columns, ("it is a film", *cell))) for cell in itertools.product(*words)]
    files = {split: Path(f"{split}.jsonl") for split in ("train", "validation", "test")}
    for file in files.values():
        file.write_text("".join(json.dumps(row) + "\\n" for row in rows))
    return files

def prepare_model(cache):
    raise AssertionError("the model was given")
"""


def test_the_notebook_runs_from_its_first_cell_to_its_last(tiny_base, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "smollm2_and_vader.py").write_text(TEXTS)
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    given = f'STEPS = {{"one task": 2, "three tasks": 2, "distillation": 2}}\nBASE = {str(tiny_base)!r}'
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(given))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert SoftPrompts.from_pretrained(folder / "prompts").lengths[1:] == (18, 18)
    assert (folder / "adapters" / "source" / "adapter_model.safetensors").is_file()


def test_the_notebook_was_run_as_it_stands_and_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = NOTEBOOK.read_text()
    assert "/home/" not in text and str(ROOT) not in text and '"output_type": "error"' not in text
    assert text.count('"image/png"') == 2
