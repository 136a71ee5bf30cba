"""The one error class: a ValueError, the same in every process."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

import lightning_softprompt
from lightning_softprompt.errors import SoftPromptError, check_at_least_one

PACKAGE = Path(lightning_softprompt.__file__).parent


class Refusing(Dataset):
    """Has one row, which cannot be used."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise SoftPromptError("rows.jsonl, line 3: unknown task 'tune'")


def test_it_is_caught_as_a_value_error_and_as_itself() -> None:
    assert lightning_softprompt.SoftPromptError is SoftPromptError and issubclass(SoftPromptError, ValueError)
    copied = pickle.loads(pickle.dumps(SoftPromptError("expected this, found that")))
    assert type(copied) is SoftPromptError and str(copied) == "expected this, found that"


@pytest.mark.parametrize("workers", [0, 1])
def test_it_comes_out_of_a_loader_s_process_with_its_message(workers: int) -> None:
    with pytest.raises(SoftPromptError, match="line 3: unknown task 'tune'"):
        next(iter(DataLoader(Refusing(), num_workers=workers)))


def test_the_library_raises_no_other_class_of_its_own_accord() -> None:
    """An abstract method, a missing name, the exit status of a command and what ends a thread are no user's errors.

    Nor is JSON that is nested too deep, until who reads it names the row: Python's own reader has that class.
    """
    expected = {"SoftPromptError", "NotImplementedError", "AttributeError", "SystemExit", "_Stopped", "RecursionError"}
    expected |= {"_unexpected", "self._no_rows", "no_source"}  # which make a SoftPromptError
    handed_on = {"first", "item"}  # what a batch or another thread raised
    handed_on |= {"found", "other", "row", "row['row']"}  # a row that could not be read
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                found.add(ast.unparse(raised))
    assert "SoftPromptError" in found and found <= expected | handed_on


def test_a_number_below_one_is_named() -> None:
    check_at_least_one(steps=1, rows=7)
    with pytest.raises(SoftPromptError, match="rows must be at least 1, got 0"):
        check_at_least_one(steps=1, rows=0)
