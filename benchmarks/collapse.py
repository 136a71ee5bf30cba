"""Runs that go wrong, without protection, under the Trainer's global clipping, and under this library's callbacks.

    python benchmarks/collapse.py [--quick] [--device cpu|cuda] [--json PATH] [--plot FOLDER]

Three tasks in one mixed run, one target token a row, AdamW with warm-up and cosine. A small Llama trained for it, ten
seeds; unless --quick, SmolLM2-135M on real texts (is it positive, which of four kinds of text, is it mild or strong),
one seed.

- healthy: a learning rate that works. 10x, 100x: that rate ten and a hundred times.
- burst: for a tenth of the run the first task's rows have wrong labels.
- loud: the first task's loss counts a thousand times.
- nan: at one step the first task's loss is not a number.

Protection: none; global: Trainer(gradient_clip_val=1.0); guard: CollapseGuard alone, in some; ours: CollapseGuard and
PromptGradientClipping(1.0), each with its defaults.

finite: percent of runs whose prompts all end finite. loss_below_start: percent of tasks whose held-out loss ends no
higher than before training. worst_loss_change: the highest rise of a task's held-out loss over its start, negative
where all fell; worst_accuracy_change: likewise the deepest fall of an accuracy, in points, positive where all rose.
first_task, other_tasks: mean held-out accuracy in percent. others_differ: the largest difference of another task's
accuracy from the healthy run with the same protection. skipped, rewound: steps and times, of all runs.
"""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import digits, parse_options, progress, report
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
    Text,
    Vocabulary,
    detach,
)
from lightning_softprompt.base.padding import pad_token_id, padded_inputs
from lightning_softprompt.base.tokens import encode_target, encode_text
from lightning_softprompt.gradients.events import Event

SCENARIOS = ("healthy", "10x", "100x", "burst", "loud", "nan")
PROTECTIONS = ("none", "global", "guard", "ours")
GUARD_ALONE = ("healthy", "100x", "nan")
SEEDS = 10
Batch = dict[str, Any]


@dataclass
class Setting:
    """A model, its tasks and their rows: batches to train on, and batches held out."""

    model: PreTrainedModel
    starts: Callable[[], SoftPrompts]
    candidates: dict[str, list[int]]  # the tokens a task's rows may have as their target
    train: list[Batch]
    held_out: list[Batch]
    learning_rate: float


@dataclass
class Outcome:
    """How a run ended: loss and accuracy by task, and what the guard saw."""

    is_finite: bool
    loss: dict[str, float]
    accuracy: dict[str, float]
    events: list[Event]
    monitor: PromptGradientNorm


class Tuning(LightningModule):
    """Trains the prompts on one target token a row, and does the first task the harm of the scenario."""

    def __init__(self, setting: Setting, scenario: str) -> None:
        super().__init__()
        self.model = setting.model
        self.setting = setting
        self.scenario = scenario
        self.first = next(iter(setting.candidates))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets, is_first = batch["targets"], torch.tensor([task == self.first for task in batch["tasks"]])
        steps, weights = len(self.setting.train), torch.ones(len(targets))
        if self.scenario == "burst" and steps // 3 <= batch_idx < steps // 3 + max(steps // 10, 3):
            known = self.setting.candidates[self.first]
            wrong = [
                known[(known.index(token) + 1) % len(known)] if token in known else token for token in targets.tolist()
            ]
            targets = torch.where(is_first.to(targets.device), torch.tensor(wrong, device=targets.device), targets)
        if self.scenario == "loud":
            weights[is_first] = 1000.0
        if self.scenario == "nan" and batch_idx == steps // 2:
            weights[is_first] = math.nan
        losses = token_losses(self.model, batch, targets) * weights.to(self.device)
        for task in dict.fromkeys(batch["tasks"]):
            rows = torch.tensor([task == other for other in batch["tasks"]])
            self.log(f"train/loss/{task}", losses[rows.to(losses.device)].mean().detach())
        return losses.mean()

    def configure_optimizers(self) -> Any:
        factor = {"10x": 10.0, "100x": 100.0}.get(self.scenario, 1.0)
        optimizer = torch.optim.AdamW(self.parameters(), lr=factor * self.setting.learning_rate, weight_decay=0.0)
        steps = len(self.setting.train)
        scheduler = get_cosine_schedule_with_warmup(optimizer, max(steps // 10, 1), steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def token_losses(model: PreTrainedModel, batch: Batch, targets: Tensor) -> Tensor:
    """Loss of each row's target, `[batch]`."""
    return functional.cross_entropy(target_logits(model, batch), targets, reduction="none")


def target_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "tasks")}
    return model(**inputs, logits_to_keep=1).logits[:, -1].float()


def run(
    setting: Setting, scenario: str, protection: str, steps: int | None = None, is_watched: bool = False
) -> Outcome:
    """One run; of no steps: how things are before training."""
    torch.manual_seed(0)
    guard, monitor = CollapseGuard(), PromptGradientNorm(every_n_steps=1)
    callbacks: list[Callback] = [SoftPromptCallback(setting.starts())]
    if is_watched:
        callbacks.append(monitor)
    if protection in ("guard", "ours"):
        callbacks.append(guard)
    if protection == "ours":
        callbacks.append(PromptGradientClipping())
    trainer = Trainer(
        accelerator="gpu" if setting.model.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=steps,
        gradient_clip_val=1.0 if protection == "global" else None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tuning(setting, scenario), DataLoader(setting.train, batch_size=None))  # type: ignore[arg-type]
    prompts = setting.model.soft_prompts
    is_finite = all(bool(torch.isfinite(prompts[task]).all()) for task in prompts.tasks)
    loss, accuracy = evaluate(setting)
    detach(setting.model)
    return Outcome(is_finite, loss, accuracy, guard.events, monitor)


@torch.no_grad()
def evaluate(setting: Setting) -> tuple[dict[str, float], dict[str, float]]:
    """Mean loss and accuracy in percent of the held-out rows, by task."""
    losses: dict[str, list[float]] = {task: [] for task in setting.candidates}
    hits: dict[str, list[bool]] = {task: [] for task in setting.candidates}
    for batch in setting.held_out:
        logits = target_logits(setting.model, batch)
        each = functional.cross_entropy(logits, batch["targets"], reduction="none").tolist()
        for task, row, loss, target in zip(batch["tasks"], logits, each, batch["targets"].tolist(), strict=True):
            known = setting.candidates[task]
            losses[task].append(loss)
            hits[task].append(known[int(row[known].argmax())] == target)
    return (
        {task: statistics.fmean(values) for task, values in losses.items()},
        {task: 100 * statistics.fmean(values) for task, values in hits.items()},
    )


def tiny(seed: int, device: str, lessons: int = 400) -> Setting:
    """A small Llama that answers by the first, second or last token of a row, as the token before the row tells it.

    It is trained for that in some seconds; then it is frozen, and prompts have to tell it the same.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    places, answers = {"alpha": 0, "beta": 1, "gamma": -1}, [3, 4]

    def batch(rows: int) -> Batch:
        ids = torch.randint(10, 64, (rows, 6))
        tasks = [list(places)[row % 3] for row in range(rows)]
        targets = [answers[int(row[places[task]] >= 37)] for task, row in zip(tasks, ids, strict=True)]
        tensors = dict(input_ids=ids, attention_mask=torch.ones_like(ids), targets=torch.tensor(targets))
        return {**{name: value.to(device) for name, value in tensors.items()}, "tasks": tasks}

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(lessons):
        made = batch(96)
        told = torch.tensor([[5 + list(places).index(task)] for task in made["tasks"]], device=device)
        logits = model(torch.cat([told, made["input_ids"]], dim=1), logits_to_keep=1).logits[:, -1]
        functional.cross_entropy(logits, made["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    def starts() -> SoftPrompts:
        return SoftPrompts.for_model(
            model, {task: Vocabulary(4 * (place % 4 + 1)) for task, place in places.items()}, seed=seed
        )

    train, held_out = [batch(24) for _ in range(200)], [batch(600)]
    return Setting(model, starts, dict.fromkeys(places, answers), train, held_out, learning_rate=0.03)


def smollm2(device: str, steps: int = 48, rows_of_each: int = 3, held_out: int = 96) -> Setting:
    """Real texts, on which a task's answer is the first token of its label."""
    import json
    import random

    model, tokenizer = peers.load_base("cpu")
    from smollm2_and_vader import prepare_texts

    labels = {
        "sentiment": ["positive", "negative"],
        "source": ["film", "product", "news", "tweet"],
        "strength": ["mild", "strong"],
    }
    instructions = {
        "sentiment": "Decide whether the text is positive or negative.\nText: ",
        "source": "Decide whether the text is film, product, news or tweet.\nText: ",
        "strength": "Is the opinion mild or strong?\nText: ",
    }
    candidates = {task: [encode_target(tokenizer, f" {word}")[0] for word in words] for task, words in labels.items()}
    splits = prepare_texts(peers.ROOT / ".cache")
    draw = random.Random(0)

    def batches(split: str, count: int, rows: int) -> list[Batch]:
        read = [json.loads(line) for line in splits[split].read_text(encoding="utf-8").splitlines()]
        draw.shuffle(read)
        made = []
        for number in range(count):
            texts, tasks, targets = [], [], []
            for place in range(rows):
                row = read[(number * rows + place) % len(read)]
                for task, words in labels.items():
                    texts.append(encode_text(tokenizer, row["text"] + "\nAnswer:"))
                    tasks.append(task)
                    targets.append(candidates[task][words.index(row[task])])
            inputs = padded_inputs(texts, pad_token_id(tokenizer), model.device)
            made.append({**inputs, "targets": torch.tensor(targets, device=model.device), "tasks": tasks})
        return made

    model.to(device)
    train, held = batches("train", steps, rows_of_each), batches("test", held_out // 8, 8)

    def starts() -> SoftPrompts:
        return SoftPrompts.for_model(
            model, {task: Text(text) for task, text in instructions.items()}, tokenizer=tokenizer
        )

    return Setting(model, starts, candidates, train, held, learning_rate=0.01)


def measure(settings: list[Setting], plot: Path | None) -> list[dict[str, Any]]:
    """A row for each scenario and protection, over all settings."""
    before = [run(setting, "healthy", "none", steps=0) for setting in settings]
    healthy: dict[str, list[Outcome]] = {}
    table = []
    for scenario in SCENARIOS:
        for protection in PROTECTIONS:
            if protection == "guard" and scenario not in GUARD_ALONE:
                continue
            progress.print(f"{scenario}, {protection}")
            ends = [run(setting, scenario, protection, is_watched=plot is not None) for setting in settings]
            healthy.setdefault(protection, ends)
            table.append({"scenario": scenario, "protection": protection, **summary(before, ends, healthy[protection])})
            if plot:
                plot.mkdir(parents=True, exist_ok=True)
                ends[0].monitor.plot().savefig(plot / f"{scenario}-{protection}.png", dpi=80)
    return table


def summary(before: list[Outcome], ends: list[Outcome], healthy: list[Outcome]) -> dict[str, Any]:
    first, *others = ends[0].loss
    rises = [end.loss[task] - start.loss[task] for start, end in zip(before, ends, strict=True) for task in end.loss]
    known = [rise for rise in rises if math.isfinite(rise)]
    apart = [abs(e.accuracy[t] - h.accuracy[t]) for e, h in zip(ends, healthy, strict=True) for t in others]
    actions = [event.action for end in ends for event in end.events]
    return {
        "finite": digits(100 * statistics.fmean(end.is_finite for end in ends)),
        "loss_below_start": digits(100 * sum(rise <= 0 for rise in known) / len(rises)),
        "worst_loss_change": digits(max(known)) if len(known) == len(rises) else "not finite",
        "worst_accuracy_change": digits(
            min(end.accuracy[t] - start.accuracy[t] for start, end in zip(before, ends, strict=True) for t in end.loss)
        ),
        "first_task": digits(statistics.fmean(end.accuracy[first] for end in ends)),
        "other_tasks": digits(statistics.fmean(end.accuracy[task] for end in ends for task in others)),
        "others_differ": digits(max(apart)),
        "skipped": actions.count("skip"),
        "rewound": actions.count("rewind"),
    }


def main() -> None:
    options = parse_options(__doc__.splitlines()[0], plot=True)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_softprompt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tables = {}
    settings = [tiny(seed, options.device) for seed in range(2 if options.quick else SEEDS)]
    name = f"A small Llama, {len(settings)} seeds, {len(settings[0].train)} steps of 24 rows"
    tables[name] = measure(settings, None)
    if not options.quick:
        setting = smollm2(options.device)
        rows = len(setting.train[0]["tasks"])
        tables[f"SmolLM2-135M, {len(setting.train)} steps of {rows} rows"] = measure([setting], options.plot)
    report("Runs that go wrong", tables, options)


if __name__ == "__main__":
    main()
