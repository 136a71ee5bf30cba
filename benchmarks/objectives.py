"""What makes a run go well: on what prompts train, and what becomes of their gradients, over seeds.

    python benchmarks/objectives.py [--quick] [--data FOLDER] [--seeds N] [--json PATH]

SmolLM2-135M in bfloat16 with prompts in float32, three tasks in one mixed run of 8 rows a task and step, prompts that
start from an instruction, AdamW at 0.02 with warm-up over an eighth of the steps, then cosine decay. A seed draws the
rows and their order; all seeds are judged on the same held-out rows.

- tokens: the loss of the target's tokens over the vocabulary. labels: that of the label among the labels.
- norm 1: the gradient of each task is clipped to norm 1. normalized: it has norm 1 in every step.

The texts are those of the demo. With --data, FOLDER holds `<task>.train.jsonl` and `<task>.validation.jsonl` of other
tasks, each row with its `text` and its `label`; texts of more than 36 tokens are left out.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import peers
import torch
from measure import digits, option_parser, parsed, progress, report
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lightning_softprompt import (
    MixedTaskGenerator,
    PromptGradientClipping,
    SoftPrompts,
    TaskTemplate,
    Text,
    attach,
    detach,
)
from lightning_softprompt.data.encoding import Example, collate, encode
from lightning_softprompt.gradients.clipping import Method
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.training.objectives import row_losses, tasks_among_labels

OBJECTIVES = ("tokens", "labels")
METHODS = tuple(method for method in get_args(Method) if method in ("norm", "normalized"))
LONGEST, ROWS_A_TASK = 36, 8
Row = dict[str, Any]


@dataclass
class Task:
    """A task's rows, and how they become tokens."""

    encoding: TaskEncoding
    start: Text
    train: list[Example]
    held_out: list[tuple[str, str]]


def tasks_of_the_demo(tokenizer: Any) -> dict[str, Task]:
    """Those of examples/demo.py, on its texts."""
    import demo

    splits = demo.prepare_texts(peers.ROOT / ".cache")
    found = {}
    for task, labels in demo.LABELS.items():
        rows = {split: [(row["text"], row[task]) for row in lines(splits[split])] for split in ("train", "test")}
        held_out = random.Random(0).sample(rows["test"], len(rows["test"]))  # the file has them by length
        found[task] = make(tokenizer, task, labels, demo.INSTRUCTIONS[task], rows["train"], held_out)
    return found


def tasks_of_a_folder(tokenizer: Any, folder: Path, held_out: int = 160) -> dict[str, Task]:
    """Those of `<task>.train.jsonl` and `<task>.validation.jsonl`."""
    found = {}
    for path in sorted(folder.glob("*.train.jsonl")):
        task = path.name.removesuffix(".train.jsonl")
        parts = []
        for part in (path, folder / f"{task}.validation.jsonl"):
            rows = [(row["text"], row["label"]) for row in lines(part)]
            parts.append([row for row in rows if len(tokenizer(row[0]).input_ids) <= LONGEST])
        labels = sorted({label for _, label in parts[0]})
        chosen = random.Random(0).sample(parts[1], min(held_out, len(parts[1])))
        instruction = f"Decide which of these the text is: {', '.join(labels)}.\nText: "
        found[task] = make(tokenizer, task, labels, instruction, parts[0], chosen)
    return found


def lines(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def make(tokenizer: Any, task: str, labels: list[str], instruction: str, train: Any, held_out: Any) -> Task:
    """A task of pairs of text and label."""
    template = TaskTemplate("{text}\nAnswer:", " {label}", [f" {label}" for label in labels])
    encoding = TaskEncoding.of(tokenizer, task, template)
    examples = [
        Example(task, *encode(encoding, {"text": text, "label": label}, task, max_length=96)) for text, label in train
    ]
    return Task(encoding, Text(instruction), examples, held_out)


def run(model: Any, tokenizer: Any, tasks: dict[str, Task], objective: Any, method: Any, seed: int, steps: int) -> Row:
    """Train the prompts of all tasks in one run, and measure them."""
    draw = random.Random(seed)
    prompts = SoftPrompts.for_model(model, {name: task.start for name, task in tasks.items()}, tokenizer, seed=seed)
    prompts.templates.update({name: task.encoding.template for name, task in tasks.items()})
    attach(model, prompts)
    try:
        parameters = {name: prompts[name] for name in tasks}
        optimizer = AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 8), steps)
        clipping = PromptGradientClipping(method=method)
        among = tasks_among_labels(objective, prompts.templates)
        label_ids = {name: tasks[name].encoding.label_ids or [] for name in among}
        orders: dict[str, list[Example]] = {name: [] for name in tasks}
        for _ in range(steps):
            chosen = []
            for name, task in tasks.items():
                if len(orders[name]) < ROWS_A_TASK:
                    orders[name] = draw.sample(task.train, len(task.train))
                chosen += [orders[name].pop() for _ in range(ROWS_A_TASK)]
            batch = collate(chosen, tokenizer.pad_token_id)
            labels, names = batch.pop("labels"), batch["tasks"]
            keep = int((labels != -100).any(0).sum()) + 1
            losses, counts = row_losses(model(**batch, logits_to_keep=keep).logits, labels[:, -keep:], names, label_ids)
            optimizer.zero_grad()
            (losses.sum() / counts.sum()).backward()
            clipping.clip(parameters)
            optimizer.step()
            schedule.step()
        generator = MixedTaskGenerator(model, tokenizer)
        right = {}
        for name, task in tasks.items():
            answers = generator.classify([text for text, _ in task.held_out], [name] * len(task.held_out))
            hits = [
                answer is not None and answer.label.strip() == label
                for answer, (_, label) in zip(answers, task.held_out, strict=True)
            ]
            right[name] = 100 * sum(hits) / len(hits)
    finally:
        detach(model)
    return {"objective": objective, "gradients": method, "seed": seed, **right, "mean": statistics.mean(right.values())}


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--data", type=Path, help="a folder with the rows of other tasks than the demo's")
    parser.add_argument("--seeds", type=int, default=5, help="the number of runs of each kind")
    options = parsed(parser)
    _, tokenizer = peers.load_base("cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    folder = peers.ROOT / ".cache" / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device)
    tasks = tasks_of_a_folder(tokenizer, options.data) if options.data else tasks_of_the_demo(tokenizer)
    rows = []
    for seed in range(1 if options.quick else options.seeds):
        for objective in OBJECTIVES:
            for method in METHODS:
                rows.append(run(model, tokenizer, tasks, objective, method, seed, 2 if options.quick else 50))
                progress.print(rows[-1])
    summary = []
    for objective in OBJECTIVES:
        for method in METHODS:
            of_kind = [row for row in rows if (row["objective"], row["gradients"]) == (objective, method)]
            summary.append({
                "objective": objective, "gradients": method,
                **{name: digits(statistics.mean(row[name] for row in of_kind)) for name in tasks},
                "mean": digits(statistics.mean(row["mean"] for row in of_kind)),
                "worst seed": digits(min(row["mean"] for row in of_kind)),
            })  # fmt: skip
    listed = [
        {name: digits(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    report("What prompts train on, and their gradients", {"Over seeds, % right": summary, "Each run": listed}, options)


if __name__ == "__main__":
    main()
