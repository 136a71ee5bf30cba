"""Greedy generation for many tasks in one batch, against PEFT, hard prompts, and no prompts at all.

    python benchmarks/mixed_inference.py [--quick] [--device cpu|cuda] [--json PATH] [--plot PATH]

All peers share the weights of SmolLM2-135M in float32; on a GPU those of a random Llama of a billion parameters, timed
in bfloat16. Texts are 8 to 24 tokens of English, padded on the left, rows in turn of every task; prompts are rows of
the embedding, so that the right answer is known: what the bare model says to [hard prompt + text], each row alone and
without pads. Every run makes the same number of tokens.

- ours: `attach(model, prompts)`; inline: the same with `prefix="never"`.
- peft: one active prompt a batch, so the rows of each task in turn: `set_adapter`, `generate`. Rows are grouped, and
  padded to the longest of their group, before the clock starts.
- hard_prompt: the bare model on one batch of [hard prompt + text] rows; no_prompt: on the texts.

*_tokens_equal: percent of new tokens that are those of the right answer, in float32. Where ours are not all equal, a
failure is printed, not a time; where PEFT's are not, its time still stands: it drops the positions of padded rows.
first_call_s is ours on prompts that have just been attached; times are of later calls, after warm-up.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from matplotlib.figure import Figure
from measure import digits, machine, medians_in_turn, parse_options, progress, report
from torch import Tensor
from transformers import PreTrainedModel

from lightning_softprompt import SoftPrompts, attach, detach
from lightning_softprompt.figures import looks, style

# Rows, tasks, prompt length, new tokens.
SIZES = [(16, 8, 20, 8), (32, 8, 32, 2), (32, 32, 20, 16), (8, 1, 100, 16)]
QUICK = 1
TASKS = (1, 2, 4, 8, 16, 32, 64)  # of the rows of the second table
SHORTEST, LONGEST = 8, 24

Size = tuple[int, int, int, int]


@dataclass
class Batch:
    """Rows of text, and the hard prompts of their tasks; `stream` is where both are cut from."""

    prompts: peers.Ids
    texts: list[list[int]]
    task_ids: Tensor

    @classmethod
    def of(cls, stream: list[int], rows: int, tasks: int, prompt_length: int) -> Batch:
        generator = torch.Generator().manual_seed(0)

        def cut(length: int) -> list[int]:
            begin = int(torch.randint(len(stream) - length + 1, (), generator=generator))
            return stream[begin : begin + length]

        prompts = [cut(prompt_length) for _ in range(tasks)]
        lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator).tolist()
        return cls(prompts, [cut(length) for length in lengths], torch.arange(rows) % tasks)

    def hard(self) -> list[list[int]]:
        return [self.prompts[task] + text for task, text in zip(self.task_ids.tolist(), self.texts, strict=True)]


def padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Ids and mask of rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return dict(input_ids=ids, attention_mask=mask)


def new_tokens(model: Any, inputs: dict[str, Tensor], count: int, **options: Any) -> Tensor:
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
    # PEFT may hand the new tokens alone back.
    assert ids.shape[1] in (count, inputs["input_ids"].shape[1] + count), ids.shape
    return ids[:, -count:]


def right_answer(base: PreTrainedModel, batch: Batch, count: int) -> Tensor:
    """Each row alone."""
    return torch.cat([new_tokens(base, padded([row], base.device), count) for row in batch.hard()])


def percent_equal(found: Tensor, expected: Tensor) -> float:
    """How many of the tokens are the expected ones, in percent."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return 100 * float((found == expected).double().mean())


def runs_of(base: PreTrainedModel, batch: Batch, count: int) -> dict[str, Callable[[], Tensor]]:
    """All peers: each call gives the new tokens of the rows, in their order."""
    device = base.device
    texts, hard, task_ids = padded(batch.texts, device), padded(batch.hard(), device), batch.task_ids.to(device)
    mine, inline = (peers.ours(base, batch.prompts, prefix) for prefix in ("auto", "never"))
    theirs, bare = peers.peft(base, batch.prompts), peers.twin(base)
    rows_of_tasks = peers.rows_of_tasks(batch.task_ids)
    groups = {task: padded([batch.texts[row] for row in rows.tolist()], device) for task, rows in rows_of_tasks.items()}
    order = torch.cat(list(rows_of_tasks.values())).argsort().to(device)

    def peft() -> Tensor:
        found = []
        for task, group in groups.items():
            theirs.set_adapter(f"task{task}")
            found.append(new_tokens(theirs, group, count))
        return torch.cat(found)[order]

    return {
        "ours": lambda: new_tokens(mine, texts, count, task_ids=task_ids),
        "inline": lambda: new_tokens(inline, texts, count, task_ids=task_ids),
        "peft": peft,
        "hard_prompt": lambda: new_tokens(bare, hard, count),
        "no_prompt": lambda: new_tokens(bare, texts, count),
    }


def first_call(base: PreTrainedModel, batch: Batch, count: int, repeats: int = 3) -> float:
    """The median time of ours on prompts that were attached just now, in a process that is warm."""
    inputs, task_ids = padded(batch.texts, base.device), batch.task_ids.to(base.device)
    times = []
    for _ in range(repeats):
        model = peers.ours(base, batch.prompts, "auto")
        start = time.perf_counter()
        new_tokens(model, inputs, count, task_ids=task_ids).tolist()  # a list waits for the GPU
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    size: Size, base: PreTrainedModel, stream: list[int], device: str, exact: PreTrainedModel | None = None
) -> dict[str, Any]:
    """One row: `base` is timed; tokens are compared on `exact`, the same model in float32, None if `base` is that."""
    row: dict[str, Any] = dict(zip(("rows", "tasks", "prompt_length", "new_tokens"), size, strict=True))
    batch, count = Batch.of(stream, *size[:3]), size[3]
    runs = runs_of(base, batch, count)
    expected = right_answer(base if exact is None else exact, batch, count)
    checked = runs if exact is None else runs_of(exact, batch, count)
    equal = {name: digits(percent_equal(checked[name](), expected)) for name in ("ours", "peft")}
    if equal["ours"] < 100:
        return {**row, "ours_s": f"FAILED: {equal['ours']} % of ours are the right tokens"}
    seconds = medians_in_turn(runs, device)
    row |= {f"{name}_s": digits(value) for name, value in seconds.items()}
    row["first_call_s"] = digits(first_call(base, batch, count))
    row["vs_peft"] = digits(seconds["peft"] / seconds["ours"])
    row["vs_no_prompt"] = digits(seconds["ours"] / seconds["no_prompt"])
    return row | {f"{name}_tokens_equal": value for name, value in equal.items()}


def tasks_in_a_batch(rows: int, base: PreTrainedModel, stream: list[int], device: str) -> list[dict[str, Any]]:
    """The same rows of more and more tasks."""
    table = []
    for tasks in TASKS:
        if tasks > rows:
            break
        progress.print(f"{rows} rows of {tasks} tasks")
        runs = runs_of(base, Batch.of(stream, rows, tasks, prompt_length=20), count=4)
        del runs["hard_prompt"]
        seconds = medians_in_turn(runs, device)
        table.append({"tasks": tasks, **{f"{name}_s": digits(value) for name, value in seconds.items()}})
    return table


def switching(base: PreTrainedModel, stream: list[int], device: str) -> list[dict[str, Any]]:
    """What another task costs: of ours beside a call of one token, and of PEFT's calls alone; in milliseconds."""
    batch = Batch.of(stream, rows=8, tasks=2, prompt_length=20)
    inputs = padded(batch.texts, base.device)
    # Two of ours, so that the one that switches has had the other task in every call before.
    mine, switched = (peers.ours(base, batch.prompts, "auto") for _ in range(2))
    theirs = peers.peft(base, batch.prompts)
    zero, one = (torch.full((8,), task, device=base.device) for task in (0, 1))
    turns, names, adapters = itertools.cycle([zero, one]), itertools.count(), itertools.cycle(["task0", "task1"])
    for task_ids in (zero, one):
        new_tokens(switched, inputs, 1, task_ids=task_ids)
    with tempfile.TemporaryDirectory() as folder:
        mine.soft_prompts.save_pretrained(Path(folder) / "ours")
        theirs.save_pretrained(Path(folder) / "peft")

        def load_ours() -> None:
            detach(mine)
            attach(mine, SoftPrompts.from_pretrained(Path(folder) / "ours"))

        def load_peft() -> None:
            name = f"loaded{next(names)}"
            theirs.load_adapter(str(Path(folder) / "peft" / "task0"), adapter_name=name)
            theirs.delete_adapter(name)

        calls: dict[str, Callable[[], Any]] = {
            "ours: 8 rows, one token, the same task again": lambda: new_tokens(mine, inputs, 1, task_ids=zero),
            "ours: 8 rows, one token, another task than before": lambda: new_tokens(
                switched, inputs, 1, task_ids=next(turns)
            ),
            "PEFT: set_adapter": lambda: theirs.set_adapter(next(adapters)),
        }
        seconds = medians_in_turn(calls, device)
        loads = {
            "ours: from_pretrained of both tasks, detach, attach": load_ours,
            "PEFT: load_adapter of one task, delete_adapter": load_peft,
        }
        seconds |= medians_in_turn(loads, device)
    same, other = list(seconds.values())[:2]
    table = [{"what": name, "ms": digits(1e3 * value)} for name, value in seconds.items()]
    # The switch is a difference of two times, and may come out below zero: then it is lost in their noise.
    return [*table[:2], {"what": "ours: the switch, their difference", "ms": digits(1e3 * (other - same))}, *table[2:]]


def draw(table: list[dict[str, Any]], rows: int, device: str, path: Path) -> None:
    """Seconds over the tasks of a batch, from the table "One batch of … rows"; `device` is the machine's name."""
    tasks = [row["tasks"] for row in table]
    labels = {
        "peft_s": "PEFT, task by task",
        "inline_s": 'ours, prefix="never"',
        "ours_s": "ours",
        "no_prompt_s": "no prompt",
    }
    with style():
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for number, (name, label) in enumerate(labels.items()):
            look = {"linestyle": "--", "color": "gray"} if name == "no_prompt_s" else {**looks(number), "marker": "o"}
            axes.plot(tasks, [row[name] for row in table], label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tasks, [str(count) for count in tasks])
        axes.set(xlabel="tasks in the batch", ylabel="seconds", ylim=(0, None))
        axes.set_title(f"{rows} rows, prompts of 20, 4 new tokens\nSmolLM2-135M, {device}")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    progress.print(f"drawn to {path}")


def main() -> None:
    options = parse_options(__doc__.splitlines()[0], plot=True)
    for message in ("`is_gradient_checkpointing` is deprecated", "Position ids are not supported"):
        warnings.filterwarnings("ignore", message=message)
    exact, tokenizer = peers.load_base(options.device)
    base = peers.to_time(exact, options.device)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        stream = torch.randint(3, base.config.vocab_size, (4096,), generator=generator).tolist()
    else:
        stream = tokenizer((peers.ROOT / "LICENSE").read_text()).input_ids  # English that stays as it is
    table = []
    for size in SIZES[:QUICK] if options.quick else SIZES:
        progress.print("rows {}, tasks {}, prompt {}, new tokens {}".format(*size))
        table.append(measure(size, base, stream, options.device, None if base is exact else exact))
    rows = 32 if options.quick else 64
    many = tasks_in_a_batch(rows, base, stream, options.device)
    if options.plot:
        draw(many, rows, machine(options.device)["device"], options.plot)
    parameters = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    title = f"Mixed inference, {parameters:.0f} M parameters, {str(base.dtype).removeprefix('torch.')}"
    tables = {
        "Mixed batches": table,
        f"{rows} rows of more and more tasks, prompts of 20, 4 new tokens": many,
        "Another task": switching(base, stream, options.device),
    }
    report(title, tables, options)


if __name__ == "__main__":
    main()
