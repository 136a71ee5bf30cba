"""The order in which the tasks of a bank are listed changes no bit, on any processor."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
    Tokens,
    attach,
)
from lightning_softprompt.prompts.statistics import prompt_statistics
from tests import modules, tiny
from tests.modules import TASKS, loader, trainer
from tests.other_rounding import OtherRounding

LISTINGS = list(itertools.permutations(tiny.HARD))


def attached(listing: tuple[str, ...], prefix: str):
    model = tiny.tiny_model()
    return attach(model, SoftPrompts.for_model(model, {task: Tokens(tiny.HARD[task]) for task in listing}), prefix)


@pytest.mark.parametrize("prefix", ["auto", "never"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients(prefix: str, side: str) -> None:
    batch = tiny.random_batch(3, side)
    names = [tiny.TASKS[task] if task >= 0 else None for task in batch.task_ids.tolist()]
    found = []
    with OtherRounding():
        for listing in LISTINGS:
            model = attached(listing, prefix)
            rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "tasks": names}
            with torch.no_grad():
                logits = model(**rows).logits
            model(**rows, labels=batch.labels).loss.backward()
            found.append([logits, *(model.soft_prompts[task].grad for task in tiny.HARD)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_rounding_by_place_is_seen() -> None:
    """What the other tests stand on: on that processor a row at another place has other bits."""
    model, ids = tiny.tiny_model(), torch.arange(4, 12).view(4, 2)
    with OtherRounding(), torch.no_grad():
        once, again, turned = model(ids).logits, model(ids).logits, model(ids.flip(0)).logits.flip(0)
    assert torch.equal(once, again) and not torch.equal(once, turned)
    assert tiny.relative_error(turned, once) < 1e-5


@pytest.mark.parametrize("scope", ["task", "global"])
def test_a_whole_run_with_what_watches_it(scope: str, tmp_path) -> None:
    def run(listing: tuple[str, ...]):
        seed_everything(0, verbose=False)
        norms, clipping = PromptGradientNorm(every_n_steps=1), PromptGradientClipping(0.01, scope=scope)
        callback = SoftPromptCallback({task: TASKS[task] for task in listing})
        fit = trainer(tmp_path, callback, norms, clipping, CollapseGuard())
        with OtherRounding():
            fit.fit(modules.Plain(), loader(names=True, key="tasks"))
        return callback.prompts, norms.history, {each.task: each for each in prompt_statistics(callback.prompts)}

    prompts, history, found = run(tuple(TASKS))
    for listing in list(itertools.permutations(TASKS))[1:]:
        others, other_history, other_facts = run(listing)
        assert others.tasks == listing
        assert all(torch.equal(prompts[task], others[task]) for task in TASKS)
        assert history == other_history and found == other_facts


@pytest.mark.parametrize("prefix", ["auto", "never"])
def test_folders_and_merges(prefix: str, tmp_path) -> None:
    batch = tiny.random_batch(4, "left")
    names = [tiny.TASKS[task] if task >= 0 else None for task in batch.task_ids.tolist()]
    found = []
    for number, listing in enumerate(LISTINGS):
        model = tiny.tiny_model()
        first, *others = (SoftPrompts.for_model(model, {task: Tokens(tiny.HARD[task])}) for task in listing)
        for other in others:
            first.update(other)
        first.save_pretrained(tmp_path / str(number))
        attach(model, SoftPrompts.from_pretrained(tmp_path / str(number)), prefix)
        assert model.soft_prompts.tasks == listing
        with OtherRounding(), torch.no_grad():
            found.append(model(batch.input_ids, attention_mask=batch.attention_mask, tasks=names).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])
