"""Pads among the tokens of training batches, in the order drawn and with rows of like length together.

    python benchmarks/padding.py [--quick] [--device cpu|cuda] [--json PATH]

Real texts of four kinds in three tasks, tokens of SmolLM2, one epoch of `TaskMixing`. drawn, grouped: pads in percent
of all columns. columns: what a batch's columns come to, grouped over drawn. order: whether both epochs have the same
rows.
"""

from __future__ import annotations

import json
from typing import Any

import peers
from measure import digits, parse_options, report

from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.data.mixing import TaskMixing


def batches_of(mixing: TaskMixing, lengths: list[int], batch_size: int) -> list[list[int]]:
    """Lengths of the rows of each batch."""
    order = list(mixing)
    return [[lengths[row] for row in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]


def pads(batches: list[list[int]]) -> tuple[int, int]:
    """Pads, and all columns times rows."""
    columns = sum(max(batch) * len(batch) for batch in batches)
    return columns - sum(map(sum, batches)), columns


def measure(tasks: list[str], lengths: list[int], batch_size: int) -> dict[str, Any]:
    """One row of the table."""
    drawn = TaskMixing(tasks, seed=0)
    grouped = TaskMixing(tasks, seed=0, lengths=lengths, batch_size=batch_size)
    before, after = pads(batches_of(drawn, lengths, batch_size)), pads(batches_of(grouped, lengths, batch_size))
    return {
        "batch_size": batch_size,
        "drawn": digits(100 * before[0] / before[1]),
        "grouped": digits(100 * after[0] / after[1]),
        "columns": digits(after[1] / before[1]),
        "order": "same rows" if sorted(drawn) == sorted(grouped) else "FAILED: other rows",
    }


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    _, tokenizer = peers.load_base("cpu")
    from smollm2_and_vader import prepare_texts

    lines = prepare_texts(peers.ROOT / ".cache")["train"].read_text(encoding="utf-8").splitlines()
    tasks, lengths = [], []
    for line in lines[:600] if options.quick else lines:
        length = len(encode_text(tokenizer, json.loads(line)["text"]))
        for task in ("sentiment", "source", "strength"):
            tasks.append(task)
            lengths.append(length)
    rows = [measure(tasks, lengths, batch_size) for batch_size in (4, 8, 16, 32, 64)]
    name = f"{len(tasks)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.0f} on average"
    report("Pads in training batches", {name: rows}, options)


if __name__ == "__main__":
    main()
