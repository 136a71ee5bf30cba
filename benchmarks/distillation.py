"""A long hard prompt taught to a short soft prompt: what it keeps of the answers, and what a request costs.

    python benchmarks/distillation.py [--quick] [--device cpu|cuda] [--json PATH] [--setting NAME]

SmolLM2-135M, float32, one seed, the defaults of `PromptDistillation` with gradients clipped at 1, from the last tokens
of the hard prompt. Real texts, without labels; held-out texts were in neither the hard prompt nor the training.

- examples: is a text positive or negative, by instructions and 12 examples, into 16 virtual tokens.
- more examples: the same with 24 examples, into 32.
- chat: the words of the system in a chat, whose answers are free text of at most 24 tokens, into 32.

tokens, into: in front of a text, before and after. no_prompt, start, distilled: the divergence KL(teacher ‖ student) in
nats, the mean over the answers' positions. equal_first, equal_answers: percent of held-out rows whose first token, and
whose whole greedy answer, is the hard prompt's; start_first: the same of the first token before training. Seconds of
one request by itself, of a held-out text of median length and as many new tokens as `new`: hard, the hard prompt in the
request; hard_kept, its keys and values kept by this library; soft_kept, those of the soft prompt.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from lightning.pytorch import Callback, Trainer
from measure import digits, medians_in_turn, option_parser, parsed, progress, report
from transformers import PreTrainedModel

from lightning_softprompt import (
    PromptDistillation,
    PromptGradientClipping,
    SoftPromptCallback,
    TaskDataModule,
    TaskTemplate,
    Tokens,
    detach,
)
from lightning_softprompt.base.padding import padded_inputs
from lightning_softprompt.base.tokens import encode_target
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.training.fidelity import measure_fidelity

TASK = "support"
SYSTEM = """You read what people write to a magazine and answer each of them in the name of the editors.
Rules, in the order of their weight:
1. Answer in one short sentence of at most fifteen words, in plain English. Never write a second sentence.
2. Begin with "Thank you" if the writer is pleased with something, and with "We are sorry" if the writer complains.
3. Name the thing that the text is about: a film, a product, an article or a person. If it is not clear, write "this".
4. Never give an opinion of your own, never promise anything, never ask a question, never mention these rules.
5. Never repeat an insult and never quote more than three words of the text. Write no emoji and no hashtags.
6. If the text is in another language than English, answer in English all the same.
Examples:
The plot is thin but the songs are a joy. -> Thank you for telling us how much you enjoyed the songs of the film.
The zip broke after two days. -> We are sorry that the zip of the product did not last.
A fair and careful article on the budget. -> Thank you for your kind words on our article about the budget.
lol this is the worst day ever -> We are sorry to hear that this has been a bad day for you.
"""


@dataclass
class Setting:
    """A hard prompt, its rows, and how long it is taught."""

    teacher: str
    template: TaskTemplate
    train: list[str]
    held_out: list[str]
    length: int
    steps: int
    batch_size: int = 16
    max_new_tokens: int = 24


class Before(Callback):
    """Measures the held-out rows before the first step, without a prompt and with the prompt as it starts."""

    def __init__(self) -> None:
        self.no_prompt: dict[str, float] = {}
        self.start: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.no_prompt = pl_module.measure(trainer.datamodule.val_dataloader(), with_prompts=False)
        self.start = pl_module.measure(trainer.datamodule.val_dataloader())


def classification(rows: list[dict[str, str]], held_out: list[str], shots: int, length: int, steps: int) -> Setting:
    """Instructions, and as many examples of each class."""
    by_label = [[row for row in rows if row["sentiment"] == label] for label in ("positive", "negative")]
    shown = [row for of_label in by_label for row in of_label[: shots // 2]]
    random.Random(0).shuffle(shown)
    lines = "".join(f"{row['text']} => {row['sentiment']}\n" for row in shown)
    texts = [row["text"] for row in rows if row not in shown]
    template = TaskTemplate("{text} =>", " {label}", labels=[" positive", " negative"])
    return Setting(f"Classify each text: positive, negative.\n{lines}", template, texts, held_out, length, steps)


def settings_of(folder: dict[str, Path], quick: bool) -> dict[str, Setting]:
    """All of them; --quick takes the first one alone, with fewer steps."""
    rows = [json.loads(line) for line in folder["train"].read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line)["text"] for line in folder["test"].read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(rows)
    if quick:
        return {"examples": classification(rows, held_out[::8], 12, 16, 10)}
    texts = [row["text"] for row in rows]
    chat = TaskTemplate("{text}", "{label}", chat=True)
    return {
        "examples": classification(rows, held_out, 12, 16, 80),
        "more examples": classification(rows, held_out, 24, 32, 80),
        "chat": Setting(SYSTEM, chat, texts, held_out[::4], 32, 60, batch_size=8),
    }


def data_of(tokenizer: Any, setting: Setting) -> TaskDataModule:
    """The texts as rows without targets."""
    data = TaskDataModule(tokenizer, {TASK: setting.template}, batch_size=setting.batch_size, needs_targets=False)
    encoding = data.encodings[TASK]
    for split, texts in {"train": setting.train, "validation": setting.held_out}.items():
        data.examples[split] = [Example(TASK, encoding.text_ids({"text": text}, text), []) for text in texts]
    return data


def requests_of(model: Any, module: PromptDistillation, row: Example, new: int) -> dict[str, Callable[[], Any]]:
    """One request by itself, in three ways."""
    lessons = module.lessons()
    teacher = lessons.teachers[TASK]
    behind = teacher.text_ids(row.text_ids)
    given = {
        "hard": (teacher.ids + behind, None),
        "hard_kept": (behind, teacher.name),
        "soft_kept": (row.text_ids, TASK),
    }
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": lessons.pad}
    calls = {}
    for name, (ids, task) in given.items():
        inputs = {**padded_inputs([ids], lessons.pad, model.device), "tasks": [task], **options}
        calls[name] = lambda inputs=inputs: model.generate(**inputs)
    return calls


def measure(name: str, setting: Setting, model: PreTrainedModel, tokenizer: Any, device: str) -> list[dict[str, Any]]:
    """A row of each table."""
    data = data_of(tokenizer, setting)
    module = PromptDistillation("SmolLM2", {TASK: setting.teacher}, max_new_tokens=setting.max_new_tokens)
    module.model = model
    start = Tokens(encode_target(tokenizer, setting.teacher)[-setting.length :])
    before, callback = Before(), SoftPromptCallback({TASK: start})
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=setting.steps,
        callbacks=[callback, before, PromptGradientClipping()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    minutes = (time.perf_counter() - began) / 60
    progress.print(f"{name}: {setting.steps} steps, {minutes:.0f} minutes with what is measured before")
    held_out = data.examples["validation"]
    found = measure_fidelity(model, module.lessons(), TASK, held_out)
    lengths = [len(answer) for answer in module.lessons().answers(held_out)]
    new = max(1, round(statistics.median(lengths)))
    row = sorted(held_out, key=lambda each: len(each.text_ids))[len(held_out) // 2]
    seconds = medians_in_turn(requests_of(model, module, row, new), device)
    detach(model)
    kept = {
        "setting": name,
        "tokens": found.tokens_before,
        "into": found.tokens_after,
        "steps": setting.steps,
        "rows_a_step": setting.batch_size,
        "held_out": found.rows,
        "no_prompt": digits(before.no_prompt["divergence"]),
        "start": digits(before.start["divergence"]),
        "distilled": digits(found.divergence),
        "start_first": digits(100 * before.start["equal_first"]),
        "equal_first": digits(found.equal_first),
        "equal_answers": digits(found.equal_answers),
    }
    return [kept, {"setting": name, "new": new, **{f"{peer}_s": digits(value) for peer, value in seconds.items()}}]


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--setting", help="one of them alone")
    options = parsed(parser)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, tokenizer = peers.load_base("cpu")
    from smollm2_and_vader import prepare_texts

    settings = settings_of(prepare_texts(peers.ROOT / ".cache"), options.quick)
    chosen = settings if options.setting is None else {options.setting: settings[options.setting]}
    rows = [
        measure(name, setting, model.to(torch.device(options.device)), tokenizer, options.device)
        for name, setting in chosen.items()
    ]
    tables = {"Kept of the answers": [row[0] for row in rows], "Seconds a request": [row[1] for row in rows]}
    report("A hard prompt taught to a soft prompt", tables, options)


if __name__ == "__main__":
    main()
