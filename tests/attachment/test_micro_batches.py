"""A step in parts: loss and gradients of the whole, one backward pass through the prompts, and the memory of a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_softprompt import SoftPromptError, attach, detach
from tests import tiny
from tests.attachment.helpers import hard_prompts, inputs


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    prompts = model.soft_prompts
    return {task: prompts[task].grad.clone() for task in prompts if prompts[task].grad is not None}


def step(model: Any, batch: tiny.Batch, scale: float = 1.0, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.soft_prompts.zero_grad()
    output = model(**inputs(batch), labels=batch.labels, **options)
    assert output.logits is None
    (output.loss * scale).backward()
    return float(output.loss.detach()), gradients_of(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix", ["always", "never"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_and_gradients_are_those_of_all_rows(kind: str, prefix: str, side: str, size: int) -> None:
    for seed in range(3):
        batch = tiny.random_batch(seed, side)
        whole = tiny.tiny_model(kind).double()
        attach(whole, hard_prompts(whole), prefix=prefix)
        loss = whole(**inputs(batch), labels=batch.labels).loss
        (loss * 3).backward()
        parts = tiny.tiny_model(kind).double()
        attach(parts, hard_prompts(parts), prefix=prefix, logits="labels", micro_batch_size=size)
        found, gradients = step(parts, batch, scale=3.0)
        assert found == pytest.approx(float(loss.detach()), rel=1e-6)  # the chunked loss is float32
        expected = gradients_of(whole)
        assert set(gradients) == set(expected)
        for task, gradient in gradients.items():
            assert tiny.relative_error(gradient, expected[task]) < 1e-6, (seed, task)


def test_the_prompts_are_run_once_and_rows_in_parts() -> None:
    model = tiny.tiny_model()
    attach(model, hard_prompts(model), prefix="always", logits="labels", micro_batch_size=2)
    batch = tiny.random_batch(0, "right")
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *call: seen.append(len(call[2])))
    step(model, batch)  # finds out about the head, by one token
    seen.clear()
    step(model, batch)
    rows, tasks = len(batch.rows), len({row.task for row in batch.rows if row.task >= 0})
    assert rows == 6 and seen == [tasks, 2, 2, 2]


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_a_step_holds_the_activations_of_a_part(prefix: str) -> None:
    """What autograd saves until a backward pass is that of one row of twelve, and that of the prompts."""
    batch = tiny.random_batch(2, "right")
    call = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in inputs(batch, labels=True).items()}
    peaks = {}
    for size in (None, 1):
        model = tiny.tiny_model()
        attach(model, hard_prompts(model), prefix=prefix, logits="labels", micro_batch_size=size)
        model(**call)  # finds out about the head
        held = {"now": 0, "most": 0}

        class Saved:
            def __init__(self, tensor: torch.Tensor, held: dict[str, int] = held) -> None:
                self.tensor, self.held = tensor, held
                held["now"] += tensor.nbytes
                held["most"] = max(held["most"], held["now"])

            def __del__(self) -> None:
                self.held["now"] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            model.soft_prompts.zero_grad()
            model(**call).loss.backward()
        peaks[size] = held["most"]
    assert peaks[1] < 0.3 * peaks[None]


def test_a_given_count_of_targets_is_what_the_loss_is_divided_by() -> None:
    model = tiny.tiny_model()
    batch = tiny.random_batch(1, "left")
    attach(model, hard_prompts(model), logits="labels")
    loss, gradients = step(model, batch, num_items_in_batch=torch.tensor(7))
    detach(model)
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=2)
    found, again = step(model, batch, num_items_in_batch=torch.tensor(7))
    assert found == pytest.approx(loss, rel=1e-5)
    for task, gradient in again.items():
        assert tiny.relative_error(gradient, gradients[task]) < 1e-5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_layers_may_be_recomputed() -> None:
    batch = tiny.random_batch(1, "left")
    model = tiny.tiny_model()
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=2)
    loss, gradients = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients_again = step(model, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    for task, gradient in gradients.items():
        assert tiny.relative_error(gradients_again[task], gradient) < 1e-5


def test_what_is_no_step_of_training_runs_as_one() -> None:
    model = tiny.tiny_model()
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=1)
    batch = tiny.random_batch(0, "left")
    assert model(**inputs(batch)).logits.shape[0] == len(batch.rows)
    with torch.no_grad():
        loss = model(**inputs(batch), labels=batch.labels).loss
    assert float(loss) == pytest.approx(step(model, batch)[0], rel=1e-5)


def test_a_step_whose_parts_do_not_add_up_is_refused() -> None:
    model = tiny.tiny_model()
    batch = tiny.random_batch(0, "left")
    with pytest.raises(SoftPromptError, match="no logits; say so with logits='labels'"):
        attach(model, hard_prompts(model), micro_batch_size=2)
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(SoftPromptError, match="a number of rows from 1"):
            attach(model, hard_prompts(model), logits="labels", micro_batch_size=wrong)
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=2)
    with pytest.raises(SoftPromptError, match="was given output_hidden_states"):
        step(model, batch, output_hidden_states=True)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(SoftPromptError, match=r"lm_head\.weight of the base trains, too"):
        step(model, batch)
    model.lm_head.weight.requires_grad_(False)
    model.loss_function = lambda **_: None
    with pytest.raises(SoftPromptError, match="a loss that is a sum over tokens"):
        step(model, batch)
    model.loss_function = ForCausalLMLoss
    with torch.autocast("cpu", torch.float16), pytest.raises(SoftPromptError, match="train in bfloat16 or float32"):
        step(model, batch)
    loss = model(**inputs(batch), labels=batch.labels).loss
    with pytest.raises(SoftPromptError, match="leave micro_batch_size out"):
        torch.autograd.grad(loss, list(model.soft_prompts.parameters()), create_graph=True)


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_frozen_prompts_and_hooks_are_what_they_are_in_one_batch(prefix: str) -> None:
    batch = tiny.random_batch(2, "right")
    found = []
    for size in (None, 2):
        model = tiny.tiny_model()
        prompts = hard_prompts(model)
        attach(model, prompts, prefix=prefix, logits="labels", micro_batch_size=size)
        first, second, *_ = prompts
        prompts[first].requires_grad_(False)
        calls: list[torch.Tensor] = []
        prompts[second].register_hook(
            lambda gradient, calls=calls: calls.append(gradient) or gradient.clamp(-0.01, 0.01)
        )
        step(model, batch)
        assert len(calls) == 1 and prompts[first].grad is None
        found.append(prompts[second].grad)
    assert tiny.relative_error(found[1], found[0]) < 1e-4


def test_a_tuple_is_given_where_one_is_asked_for() -> None:
    model = tiny.tiny_model()
    batch = tiny.random_batch(1, "left")
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=2)
    expected, _ = step(model, batch)
    (loss,) = model(**inputs(batch), labels=batch.labels, return_dict=False)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_hidden_states_by_the_configuration_are_refused_too() -> None:
    model = tiny.tiny_model()
    model.config.output_hidden_states = True
    attach(model, hard_prompts(model), logits="labels", micro_batch_size=2)
    with pytest.raises(SoftPromptError, match="was given output_hidden_states"):
        step(model, tiny.random_batch(0, "left"))
