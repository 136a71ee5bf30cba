"""What prompts learn from few rows, and which of a run's prompts is the one to keep, over seeds.

    python benchmarks/few_rows.py --data FOLDER [--quick] [--rows N] [--seeds N ...] [--file PATH] [--json PATH]

The run is `plain` of variants.py, with so many training rows a task and 32 other rows a task to validate on, which the
seed draws: at the start, and every ten steps. In the end all prompts are judged on the same held-out rows:

- start: the instruction, before training. end: after the last step.
- kept by accuracy: of each task the prompt that validated best by accuracy, and by the loss of the target's tokens
  where two are equal, as `BestPrompts` does it. By loss, by label loss: by one of these alone.

Rows go to the file of --file as they come; a rerun goes on behind what is there, and makes the tables.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import objectives
import peers
import torch
import variants
from measure import digits, option_parser, parsed, progress, report
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lightning_softprompt import PromptGradientClipping, detach
from lightning_softprompt.data.encoding import Example, collate
from lightning_softprompt.training.objectives import label_loss, token_losses

VALIDATION, HELD_OUT, EVERY = 32, 120, 10
Measured = tuple[float, float, float]  # accuracy, label loss, loss
WAYS: dict[str, Callable[[Measured], Any]] = {
    "kept by accuracy": lambda found: (found[0], -found[2]),
    "kept by loss": lambda found: -found[2],
    "kept by label loss": lambda found: -found[1],
}


@torch.no_grad()
def validate(bank: variants.Bank, name: str, examples: list[Example]) -> Measured:
    label_ids = bank.tasks[variants.task_of(name)].encoding.label_ids or []
    batch = collate(examples, bank.tokenizer.pad_token_id)
    labels = batch["labels"]
    keep = int((labels != -100).any(0).sum()) + 1
    inputs = {each: batch[each].to(bank.model.device) for each in ("input_ids", "attention_mask")}
    logits = bank.model(**inputs, tasks=[name] * len(examples), logits_to_keep=keep).logits.float().cpu()
    labels = labels[:, -keep:]
    among = label_loss(logits, labels, [name] * len(examples), {name: label_ids}, reduction="none")
    losses, counts = token_losses(logits, labels)
    first = torch.tensor([ids[0] for ids in label_ids])
    columns = (labels != -100).int().argmax(1) - 1
    chosen = first[logits[torch.arange(len(examples)), columns][:, first].argmax(1)]
    hits = chosen == labels[torch.arange(len(examples)), columns + 1]
    return hits.float().mean().item(), among.mean().item(), (losses.sum() / counts.sum()).item()


def run(bank: variants.Bank, validation: dict[str, list[Example]], steps: int) -> dict[str, Any]:
    """Train, and judge the prompts of each way to keep them."""
    prompts = bank.prompts(bank.starts(1))
    parameters = {name: prompts[name] for name in prompts}
    optimizer = AdamW(parameters.values(), lr=variants.RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 8), steps)
    clipping = PromptGradientClipping(method="normalized")
    seen: list[dict[str, tuple[Measured, Tensor]]] = []

    def look() -> None:
        found = {name: validate(bank, name, validation[variants.task_of(name)]) for name in parameters}
        seen.append({name: (found[name], parameters[name].detach().clone()) for name in parameters})

    judged = {"start": bank.judge(parameters)}
    look()
    for step in range(1, steps + 1):
        rows = {name: bank.rows(variants.task_of(name), objectives.ROWS_A_TASK) for name in parameters}
        losses, counts, _ = bank.losses(rows, None)
        optimizer.zero_grad()
        (losses.sum() / counts.sum()).backward()
        clipping.clip(parameters)
        optimizer.step()
        schedule.step()
        if step % EVERY == 0 or step == steps:
            look()
    judged["end"] = bank.judge(parameters)
    for way, rank in WAYS.items():
        for name, parameter in parameters.items():
            best = max(seen, key=lambda each, name=name: rank(each[name][0]))  # type: ignore[misc]
            parameter.data.copy_(best[name][1])
        judged[way] = bank.judge(parameters)
    detach(bank.model)
    return judged


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--file", type=Path, help="rows go there as they come, and are taken from there")
    parser.add_argument("--data", type=Path, required=True, help="a folder with the rows of the tasks")
    parser.add_argument("--rows", type=int, default=16, help="training rows of a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="a run for each of them")
    options = parsed(parser)
    _, tokenizer = peers.load_base("cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    folder = peers.ROOT / ".cache" / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device)
    tasks = objectives.tasks_of_a_folder(tokenizer, options.data, held_out=HELD_OUT)
    found = list(objectives.lines(options.file)) if options.file and options.file.exists() else []
    seeds = options.seeds[:1] if options.quick else options.seeds
    for seed in seeds:
        if any((row["seed"], row["rows"]) == (seed, options.rows) for row in found):
            continue
        torch.manual_seed(seed)
        draw, few, validation = random.Random(1000 + seed), {}, {}
        for name, task in tasks.items():
            drawn = draw.sample(task.train, options.rows + VALIDATION)
            few[name] = objectives.Task(task.encoding, task.start, drawn[: options.rows], task.held_out)
            validation[name] = drawn[options.rows :]
        bank = variants.Bank(model, tokenizer, few, seed)
        found.append(
            {"seed": seed, "rows": options.rows} | run(bank, validation, 2 if options.quick else variants.STEPS)
        )
        if options.file:
            with options.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")
        progress.print(found[-1])
    runs = [row for row in found if row["rows"] == options.rows and row["seed"] in seeds]
    summary, each = [], []
    for way in ("start", "end", *WAYS):
        means = {name: digits(statistics.mean(row[way][name] for row in runs)) for name in (*tasks, "mean")}
        summary.append({"prompts": way, **means, "worst seed": digits(min(row[way]["mean"] for row in runs))})
    for row in runs:
        each.append({"seed": row["seed"]} | {way: digits(row[way]["mean"]) for way in ("start", "end", *WAYS)})
    title = f"{options.rows} rows a task, % right"
    report("What prompts learn from few rows", {title: summary, "Each run, mean of the tasks": each}, options)


if __name__ == "__main__":
    main()
