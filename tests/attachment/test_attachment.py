"""What an attachment is while it lasts: its hooks, what stays of a call, and the mode of the base."""

from __future__ import annotations

import functools
import gc

import peft
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_softprompt import SoftPromptError, detach
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.running import PASSES
from tests import tiny
from tests.attachment.helpers import attached


def test_nothing_of_a_step_or_a_generation_outlives_it(kind: str) -> None:
    # A cycle would hold keys, values and the graph behind them until Python collects its garbage.
    _, model, _ = attached(kind)
    batch = tiny.random_batch(0, "left")
    rows = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)

    def train() -> None:
        model(**rows, labels=batch.labels).loss.backward()

    def generate() -> None:
        model.generate(**rows, max_new_tokens=2, do_sample=False)

    for call in (train, generate):
        call()
        gc.collect()
        gc.disable()
        try:
            before = tensors_alive()
            call()
            assert tensors_alive() == before, call.__name__
        finally:
            gc.enable()


def test_an_interrupted_pass_leaves_nothing_behind(kind: str) -> None:
    _, model, _ = attached(kind)
    batch = tiny.random_batch(23, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    other = torch.randint(2, tiny.VOCABULARY, (6, batch.input_ids.shape[1] + 7))
    with torch.no_grad():
        expected = model(other, task_ids=torch.full((6,), -1)).logits

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: interrupt() if PASSES.innermost else None
        )
        with pytest.raises(KeyboardInterrupt):
            model(**arguments)
        handle.remove()
        assert torch.equal(model(other, task_ids=torch.full((6,), -1)).logits, expected)


@pytest.mark.usefixtures("route")
def test_a_call_inside_of_a_pass_is_refused(kind: str) -> None:
    _, model, _ = attached(kind)
    ids, outer = torch.tensor([[9, 8, 7]]), {"tasks": ["long"]}
    with torch.no_grad():
        expected = model(ids, **outer).logits
        layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        inside = []

        def hook(*_: object) -> None:
            if isinstance(PASSES.innermost, ForwardPass) and not inside:  # a prefix is computed in one of another kind
                inside.append(None)
                inside.append(model(ids, tasks=["one"]).logits)

        handle = layer.register_forward_hook(hook)
        with pytest.raises(SoftPromptError, match="called inside of a pass of its own, as by a hook"):
            model(ids, **outer)
        handle.remove()
        assert torch.equal(model(ids, **outer).logits, expected)
        assert torch.equal(inside[1], model(ids, tasks=["one"]).logits)


def test_the_base_stays_in_eval_mode(kind: str) -> None:
    _, model, _ = attached(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = tiny.random_batch(26, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        expected = model(**arguments).logits
        model.train()
        assert torch.equal(model(**arguments).logits, expected)
    assert not any(module.training for module in model.modules())


def test_a_layer_that_is_patched_while_prompts_are_attached_stays_so(kind: str) -> None:
    _, model, _ = attached(kind)
    first, second = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][:2]
    patched = functools.partial(type(first).forward, first)
    first.forward = patched
    del second.forward
    detach(model)
    assert first.forward is patched and "forward" not in second.__dict__
    assert model.train().training and "soft_prompts" not in model._modules


def test_an_interrupted_pass_holds_no_model_that_was_detached(kind: str) -> None:
    _, model, _ = attached(kind)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.get_output_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[9, 8, 7]]), tasks=["long"])
    detach(model)
    assert PASSES.innermost is None


class Wrapped(torch.nn.Module):
    """A module around the weight of an embedding that computes what the embedding did."""

    def __init__(self, inner: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("how", ["replaced", "wrapped", "LoRA"])
def test_prompts_stand_before_rows_when_the_embedding_is_another_one(how: str) -> None:
    bare, model, prompts = attached("llama")
    batch = tiny.random_batch(7, "left")
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    with torch.no_grad():
        model(**rows)  # what is kept of prompts is of the embedding before
        prompt = {task: prompts[task].clone() for task in prompts}
        for each in (bare, model):
            inner = each.get_input_embeddings()
            if how == "LoRA":
                torch.manual_seed(1)
                config = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
                peft.get_peft_model(each, config).eval()
            else:
                copied = torch.nn.Embedding.from_pretrained(inner.weight.clone())
                each.set_input_embeddings(copied if how == "replaced" else Wrapped(inner))
        logits = model(**rows).logits
        for index, row in enumerate(batch.rows):
            text = bare.get_input_embeddings()(torch.tensor([row.text]))
            before = prompt[tiny.TASKS[row.task]][None] if row.prompt else text[:, :0]
            expected = bare(inputs_embeds=torch.cat([before, text], 1)).logits[0, len(row.prompt) :]
            found = logits[index, batch.start[index] :]
            assert tiny.relative_error(found, expected) < 1e-5
    detach(model)
    assert not model.get_input_embeddings()._forward_hooks


def tensors_alive() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
