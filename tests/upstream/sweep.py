"""Transformers' own tests on bare models, and on attached ones whose rows have no prompt: `make test-transformers`."""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tests.upstream import source
from tests.upstream.outcome import EXCLUDED, EXPECTED, Outcome, examine

TYPES = (
    "llama", "gpt2", "bloom", "gemma2", "opt", "mistral", "qwen2", "recurrent_gemma", "rwkv", "xlnet", "ctrl",
)  # fmt: skip


def table(outcomes: list[Outcome]) -> Table:
    """A row for each type: of the tests that pass attached, how many run a model; of those that fail, how many must."""
    found = Table(title=f"the common tests of transformers {transformers.__version__}")
    kinds = {
        "run": "tests run",
        "bare": "pass bare",
        "attached": "pass attached",
        "with passes": "running a model",
        "expected": "expected",
    }
    for column in ("type", *kinds.values(), "FAILED"):
        found.add_column(column, justify="left" if column == "type" else "right")
    for outcome in outcomes:
        failed = sum(map(len, outcome.failures.values()))
        found.add_row(outcome.model_type, *(str(outcome.counts[kind]) for kind in kinds), str(failed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help=f"examine these in place of {', '.join(TYPES)}")
    types = parser.parse_args().types or TYPES
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console(file=sys.stdout)
    common = source.common_tests()
    outcomes = [examine(model_type, common) for model_type in track(types, "examining", console=console)]
    console.print(table(outcomes))
    for expectation in EXPECTED:
        console.print(f"expected of {', '.join(expectation.tests)}: {expectation.reason}", soft_wrap=True)
    for name, reason in EXCLUDED.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True)
    for outcome in outcomes:
        show(console, "fails bare, and counts for nothing", outcome.model_type, outcome.bare_failures)
    for outcome in outcomes:
        show(console, "[bold red]FAILED[/]", outcome.model_type, outcome.failures)
    failed = sum(len(outcome.failures) for outcome in outcomes)
    sys.exit(f"{failed} tests pass bare and fail attached" if failed else 0)


def show(console: Console, what: str, model_type: str, failures: dict[tuple[str, str], list[str]]) -> None:
    """A line for each failure."""
    for (name, error), masks in failures.items():
        text = f"{what}: {model_type} {name} (masks: {', '.join(masks)}): {escape(error)}"
        console.print(text, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
