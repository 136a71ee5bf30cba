"""Examine every type and write `docs/models.md`: `make conformance`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.progress import track

from tests.conformance import models
from tests.conformance.oracle import examine
from tests.conformance.outcome import EXACT, FAILED, PREFIX, REFUSED, USUAL, WITHIN, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = ["type", "result", *PREFIX, "class", "reason"]


def counts(outcomes: list[Outcome]) -> str:
    """The sentence of the page that says how many of what."""
    built = [outcome for outcome in outcomes if outcome.is_built]
    exact = Counter(check for outcome in built for check, result in outcome.results.items() if result == EXACT)
    forward = sum(o.results["logits, right"] == o.results["logits, left"] == EXACT for o in built)
    refused = sum(set(o.results.values()) == {REFUSED} for o in built)
    failed = sum(outcome.has_failed for outcome in built)
    return (
        f"Of {len(outcomes)} types, {len(built)} can be built; forward passes are exact on {forward}, gradients on "
        f"{exact['gradients']}, greedy generation on {exact['generation, left']}; {refused} are refused when attached; "
        f"{failed} fail. As a prefix, prompts train on {exact[PREFIX[0]]} and generate on "
        f"{exact[PREFIX[1]] + sum(o.results[PREFIX[1]] == WITHIN for o in built)}."
    )


def page(outcomes: list[Outcome]) -> str:
    """`docs/models.md`."""
    lines = [
        "# Which models",
        "",
        f"Every type that transformers {transformers.__version__} maps to a causal LM, as a tiny random model in",
        "float32. A mixed batch of rows of different tasks, prompts and lengths is compared with the bare model on",
        "each row alone, unpadded, with hard tokens in front. `make conformance` examines all and writes this page.",
        "",
        counts(outcomes),
        "",
        f"The result is that of nine checks: {'; '.join(USUAL)}. Right and left are the sides of the pads.",
        "",
        "- **exact**: logits within 1e-5, or ten times what the bare model itself rounds when it pads the same rows;",
        "  the loss within 2e-6; gradients of every prompt within 1e-4 (all relative); greedy tokens identical.",
        "- **refused**: an error that names the model and says why, when it is attached or called.",
        "- **its own**: the model's loss is not the shifted cross entropy; it is kept as it is.",
        "- **—**: the bare model has no such thing, or cannot be built.",
        "- **inline**: such batches get their prompts in the sequence, as a prefix would not be exact. Training is",
        "  with rows padded on the right, generation with rows padded on the left; windows are four columns wide,",
        "  so that they cut. Where they hold the row, as they nearly always do: **exact within its window**.",
        "- Where a model takes no positions, rows of different lengths are generated one by one.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
        *("| " + " | ".join(outcome.row()) + " |" for outcome in outcomes),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="examine these alone, and print what was found")
    types = parser.parse_args().types
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = [examine(model_type) for model_type in track(types or models.TYPES, "examining")]
    failures = [outcome for outcome in outcomes if outcome.has_failed]
    if not types:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes))
    for outcome in outcomes if types else failures:
        print(" | ".join(outcome.row()))
    print(counts(outcomes))
    sys.exit(f"{FAILED}: {', '.join(outcome.model_type for outcome in failures)}" if failures else 0)


if __name__ == "__main__":
    main()
