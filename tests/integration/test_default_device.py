"""Another default device, as Lightning sets the GPU inside `configure_model`: "meta", whose tensors have no values."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_softprompt import (
    Labels,
    MixedTaskGenerator,
    Normal,
    Prompt,
    SoftPrompts,
    Text,
    Tokens,
    Vocabulary,
    attach,
)
from lightning_softprompt.data.mixing import TaskMixing
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, inputs
from tests.tokenizer import word_tokenizer

TOKENIZER = word_tokenizer(["good", "bad", "film"])
STARTS = {
    "labels": Labels(["good", "bad"], length=4),
    "noise": Normal(3),
    "sampled": Vocabulary(3),
    "ids": Tokens([5, 6]),
    "text": Text("good film"),
    "copied": Prompt("noise"),
}


def test_prompts_are_made_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    expected = SoftPrompts.for_model(model, STARTS, tokenizer=TOKENIZER)
    with torch.device("meta"):
        made = SoftPrompts.for_model(model, STARTS, tokenizer=TOKENIZER)
        made.save_pretrained(tmp_path)
        loaded = SoftPrompts.from_pretrained(tmp_path)
        attach(model, loaded)
    for task in STARTS:
        assert torch.equal(made[task], expected[task]) and torch.equal(loaded[task], expected[task]), task


def test_rows_are_drawn_in_the_same_order() -> None:
    tasks = ["tone"] * 20 + ["topic"] * 9
    with torch.device("meta"):
        found = list(TaskMixing(tasks, seed=3, temperature=2.0))
    assert found == list(TaskMixing(tasks, seed=3, temperature=2.0))


def test_an_attached_model_is_called() -> None:
    for prefix in ("always", "never"):
        bare, batch = tiny.tiny_model(), tiny.random_batch(0, "right")
        prompts = SoftPrompts.for_model(bare, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
        model = attach(tiny.tiny_model(), prompts, prefix=prefix)
        with torch.device("meta"):
            out = model(**inputs(batch, labels=True))
            out.loss.backward()
        assert_rows_equal(bare, batch, out.logits)
        assert all(prompt.grad is not None for prompt in prompts.parameters())


def test_a_generator_answers() -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"ids": Tokens([5, 6]), "noise": Normal(3)})
    generator = MixedTaskGenerator(attach(tiny.tiny_model(), prompts), TOKENIZER)
    rows, tasks = ["good film", "bad", "film"], ["ids", "noise", None]
    expected = generator.generate(rows, tasks, max_new_tokens=4), generator.answer(rows, tasks, max_new_tokens=4)
    with torch.device("meta"):
        assert (generator.generate(rows, tasks, max_new_tokens=4), generator.answer(rows, tasks, 4)) == expected
