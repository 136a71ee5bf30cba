"""Ways to teach one model several tasks, at equal steps and at equal minutes, over seeds.

    python benchmarks/methods.py [--quick] [--data FOLDER] [--seeds N ...] [--steps N] [--rows PATH] [--json PATH]
                                 [--plot PATH]

SmolLM2-135M on one thread of a CPU, or on a GPU, in bfloat16; all that is trained is float32. A seed draws the rows and
their order, the same for all methods; all are judged on the same held-out rows, by the likeliest of a task's labels.
All use AdamW with warm-up over an eighth of the steps, then cosine decay, and train on the tokens or among the labels,
as objectives.py explains. So do its data.

- soft prompts: this library's, all tasks in one mixed run. They start from the task's instruction, at a rate of 0.02,
  each task's gradient of norm 1. A step has 8 rows of each task.
- prompt tuning: PEFT's, from the same instruction, at the same rate, clipped at norm 1. Rows are padded on the right,
  as PEFT drops the positions of padded rows. This and the next two learn one task after another, 8 rows a step.
- LoRA: PEFT's, of rank 8 on the projections of the attention, an adapter a task; clipped at norm 1.
- full tuning: float32 weights under bfloat16 autocast, a model a task, each from the base; clipped at norm 1. It is
  judged and saved in bfloat16.
- hard prompt: the instruction; nothing is trained. LoRA and full tuning have it in front of their rows, too.
- hard prompt, examples: with two training rows of each label behind it, which the seed draws.

The rates of LoRA and full tuning are the best of three on the held-out rows, with seed 0, half the steps and the loss
of the tokens. Equal steps: each task has as many steps of 8 rows as it has with soft prompts. Equal minutes: as many as
fit into the seconds of that seed's soft prompts, by the method's own seconds a step; where that is within a tenth
of as many, one run stands for both.

memory_MB: all weights, and the most that the first step of training holds beside them. saved_bytes: of the files of a
task. switch_ms: to another task. With soft prompts a batch in which one row of nine is another task's, against nine of
one task, so a difference that may be lost in noise; with PEFT `set_adapter`; with full tuning the file, loaded. Seconds
are those of the processor on a CPU, and those that pass on a GPU.

Rows go to the file of --rows as they come; a rerun goes on behind what is there, and makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peers
import torch
from learners import FULL, LORA, OURS, TRAINED, TUNING, UNTRAINED, Setting, properties, trained, untrained
from matplotlib.figure import Figure
from measure import digits, keep_freed_memory, machine, option_parser, parsed, progress, report
from objectives import OBJECTIVES, Row, lines, tasks_of_a_folder, tasks_of_the_demo
from transformers import AutoModelForCausalLM

from lightning_softprompt.figures import looks, style

RATES = {OURS: [0.02], TUNING: [0.02], LORA: [3e-4, 1e-3, 3e-3], FULL: [1e-5, 3e-5, 1e-4]}
HELD_OUT = 120


class Rows:
    """The rows of a run: each is made once, and stays in the file."""

    def __init__(self, path: Path | None, common: Row) -> None:
        self.path, self.common = path, common
        self.all: list[Row] = list(lines(path)) if path and path.exists() else []

    def get(self, key: Row, make: Callable[..., Row], *arguments: Any) -> Row:
        """The row of a key; it is made of the arguments if it is not there."""
        if found := self.of(**key):
            return found[0]
        row = make(*arguments) | self.common | key
        self.all.append(row)
        progress.print(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def of(self, **key: Any) -> list[Row]:
        """All rows of this run that have what the key says."""
        return [row for row in self.all if row.items() >= (self.common | key).items()]


def run(setting: Setting, rows: Rows, seeds: Iterable[int], steps: int, to_try: dict[str, list[float]]) -> None:
    """Make every row that is not there, seed by seed."""
    rates = {}
    for method in TRAINED:
        tries = []
        for rate in to_try[method] if len(to_try[method]) > 1 else ():
            key = {"kind": "rate", "method": method, "objective": "tokens", "budget": "a rate is tried", "tried": rate}
            tries.append(rows.get(key, trained, setting, method, "tokens", 0, max(1, steps // 2), rate))
        rates[method] = max(tries, key=mean)["tried"] if tries else to_try[method][0]
    for method in (*UNTRAINED, *TRAINED):
        rows.get({"kind": "properties", "method": method}, properties, setting, method, rates.get(method, 0.0))
    for seed in seeds:
        for method in UNTRAINED:
            key = {"kind": "run", "seed": seed, "method": method, "objective": "", "budget": ""}
            rows.get(key, untrained, setting, method, seed)
        for objective in OBJECTIVES:
            limit = 0.0
            for method in TRAINED:
                key = {"kind": "run", "seed": seed, "method": method, "objective": objective}
                arguments = setting, method, objective, seed
                row = rows.get(key | {"budget": "steps"}, trained, *arguments, steps, rates[method])
                limit = limit or row["seconds"]  # ours come first
                count = max(1, round(steps * limit / row["seconds"]))
                key["budget"] = "minutes"
                if abs(count - steps) <= steps / 10:
                    rows.get(key, dict, row)
                else:
                    rows.get(key, trained, *arguments, count, rates[method])


def mean(row: Row) -> float:
    """Of the accuracies of the tasks."""
    return statistics.mean(row["accuracy"].values())


def summaries(rows: Rows, budget: str) -> list[Row]:
    """A row for each method and objective, over the seeds."""
    found = []
    kinds = [(method, "", "") for method in UNTRAINED]
    kinds += [(method, objective, budget) for objective in OBJECTIVES for method in TRAINED]
    for method, objective, of_budget in kinds:
        runs = rows.of(kind="run", method=method, objective=objective, budget=of_budget)
        if not runs:
            continue
        means = [mean(row) for row in runs]
        found.append({
            "method": method, "objective": objective, "steps": digits(statistics.mean(row["steps"] for row in runs)),
            **{task: digits(statistics.mean(row["accuracy"][task] for row in runs)) for task in runs[0]["accuracy"]},
            "mean": digits(statistics.mean(means)), "worst seed": digits(min(means)),
            "spread": digits(max(means) - min(means)), "seeds": len(runs),
            "minutes": digits(statistics.mean(row["seconds"] for row in runs) / 60),
        })  # fmt: skip
    return found


def costs(rows: Rows) -> list[Row]:
    """What each method takes."""
    found = []
    for row in rows.of(kind="properties"):
        runs = rows.of(kind="run", method=row["method"], budget="steps")
        seconds = [each["seconds"] / each["steps"] for each in runs]
        rate = {"rate": runs[0]["rate"], "step_s": digits(statistics.median(seconds))} if runs else {}
        kept = ("parameters", "memory_MB", "saved_bytes", "switch_ms")
        found.append({"method": row["method"], **rate, **{name: row[name] for name in kept if name in row}})
    return found


def each_run(rows: Rows) -> list[Row]:
    """The runs, and the tries of rates, as they were."""
    found = []
    for row in rows.of(kind="rate") + rows.of(kind="run"):
        listed = {"method": row["method"], "objective": row["objective"], "equal": row["budget"]}
        right = {name: digits(value) for name, value in row["accuracy"].items()}
        numbers = {name: row.get(name, "") for name in ("seed", "steps", "seconds", "rate")}
        found.append(listed | numbers | right | {"mean": digits(mean(row))})
    return found


def draw(tables: dict[str, list[Row]], device: str, path: Path) -> None:
    """Accuracy over minutes and over parameters, from the tables of `main`: the mean of the seeds, worst to best."""
    parameters = {row["method"]: row["parameters"] for row in tables["What a method takes"]}
    with style():
        figure = Figure(figsize=(11, 4.8))
        both = figure.subplots(1, 2, sharey=True)
        for budget, marker in (("steps", "o"), ("minutes", "^")):
            for row in tables[f"At equal {budget}, % right"]:
                method, objective, middle, worst = (row[key] for key in ("method", "objective", "mean", "worst seed"))
                if method in UNTRAINED:
                    continue
                color = looks(TRAINED.index(method))["color"]
                bars = [[middle - worst], [worst + row["spread"] - middle]]
                look = {"fmt": marker, "color": color, "capsize": 3}
                look["markerfacecolor"] = color if objective == "tokens" else "white"
                look["label"] = f"{method}, {objective}" if budget == "steps" else None
                for axes, where in zip(both, (row["minutes"], parameters[method]), strict=True):
                    axes.errorbar(where, middle, bars, **look)
        levels = {row["method"]: row["mean"] for row in tables["At equal steps, % right"]}
        for method, dashes in zip(UNTRAINED, (":", "--"), strict=True):
            for axes in both:
                axes.axhline(levels[method], linestyle=dashes, color="gray", label=method)
        both[0].set(xlabel="minutes of training", ylabel="% right, mean of the tasks", xlim=(0, None))
        both[1].set(xlabel="trained parameters a task", xscale="log")
        both[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.suptitle(
            f"SmolLM2-135M, {device}\ncircles: equal steps; triangles: equal minutes; bars: worst seed to best"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    progress.print(f"drawn to {path}")


def options_of_the_command() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with the rows of other tasks than the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="a run of each kind for each of them")
    parser.add_argument("--steps", type=int, default=24, help="those of soft prompts")
    parser.add_argument("--rows", type=Path, help="rows go there as they come, and are taken from there")
    parser.add_argument("--json", type=Path, help="write the tables there")
    parser.add_argument("--plot", type=Path, help="draw a PNG there")
    return parsed(parser)


def main() -> None:
    options = options_of_the_command()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(1)
    keep_freed_memory(True)
    steps, held_out = (2, 16) if options.quick else (options.steps, HELD_OUT)
    seeds = options.seeds[:1] if options.quick else options.seeds
    _, tokenizer = peers.load_base("cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    folder = peers.ROOT / ".cache" / "smollm2-135m"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base = base.eval().requires_grad_(False).to(options.device)
    tasks = tasks_of_a_folder(tokenizer, options.data) if options.data else tasks_of_the_demo(tokenizer)
    for name, task in tasks.items():
        task.held_out = task.held_out[:held_out]
        if any(len(ids) > 1 for ids in task.encoding.label_ids or []):
            raise SystemExit(f"task {name}: labels of one token are wanted, and one of these has more")
    data = options.data.name if options.data else "demo"
    rows = Rows(options.rows, {"data": data, "ours_steps": steps, "held_out": held_out})
    to_try = {method: rates[:1] if options.quick else rates for method, rates in RATES.items()}
    run(Setting(base, tokenizer, tasks, folder), rows, seeds, steps, to_try)
    tables = {
        "At equal steps, % right": summaries(rows, "steps"),
        "At equal minutes, % right": summaries(rows, "minutes"),
        "What a method takes": costs(rows),
        "Each run": each_run(rows),
    }
    if options.plot:
        draw(tables, machine(options.device)["device"], options.plot)
    report("Methods beside one another", tables, options)


if __name__ == "__main__":
    main()
