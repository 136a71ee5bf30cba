"""Attaching and detaching: what of a model changes and what does not, what is left behind, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import (
    GPT2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_softprompt import SoftPromptError, SoftPrompts, attach, detach
from tests import tiny
from tests.attachment.helpers import attached

pytestmark = pytest.mark.usefixtures("route")


def test_detach_leaves_no_trace(kind: str) -> None:
    model = tiny.tiny_model(kind)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.train()
    bare = copy.deepcopy(model)
    names = set(model.__dict__), list(model.state_dict()), [n for n, _ in model.named_modules()]
    hooks = {n: _hooks(m) for n, m in model.named_modules()}
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 2})
    assert attach(model, prompts) is model
    assert type(model) is type(bare) and list(model.state_dict()) == names[1]
    assert not any(m.training for m in model.modules() if m is not prompts)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "soft_prompts.prompt:a",
        "soft_prompts.prompt:b",
    ]
    batch = tiny.random_batch(20, "left")
    model.generate(batch.input_ids, attention_mask=batch.attention_mask, tasks=["a"] * 6, max_new_tokens=2)
    assert detach(model) is model
    assert (set(model.__dict__), list(model.state_dict()), [n for n, _ in model.named_modules()]) == names
    assert {n: _hooks(m) for n, m in model.named_modules()} == hooks
    for (name, found), (_, expected) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad, name
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(batch.input_ids).logits, bare.eval()(batch.input_ids).logits)
    with pytest.raises(SoftPromptError, match="nothing to detach"):
        detach(model)


def _hooks(module: torch.nn.Module) -> tuple[int, ...]:
    return tuple(
        len(getattr(module, name))
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_state_dict_hooks",
            "_load_state_dict_post_hooks",
        )
    )


def test_an_attached_model_saves_and_loads_the_bare_state(kind: str, tmp_path) -> None:
    bare, model, _ = attached(kind)
    model.load_state_dict(bare.state_dict())
    model.save_pretrained(tmp_path)
    again = type(bare).from_pretrained(tmp_path)
    for name, value in bare.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_deep_copy_is_attached_for_itself(kind: str) -> None:
    _, model, prompts = attached(kind)
    batch = tiny.random_batch(21, "left")
    arguments = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    with torch.no_grad():
        expected = model(**arguments).logits
        twin = copy.deepcopy(model)
        prompts["long"].zero_()
        assert torch.equal(twin(**arguments).logits, expected)
    assert torch.equal(twin.generate(**arguments, max_new_tokens=2)[:, :2], batch.input_ids[:, :2])
    assert twin.generate.__self__.model is twin


def test_what_is_pickled_is_attached_for_itself(kind: str) -> None:
    _, model, _ = attached(kind)
    text = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        expected = model(text, tasks=["long"]).logits
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(text, tasks=["long"]).logits, expected)
        twin.soft_prompts["long"].zero_()
        assert torch.equal(model(text, tasks=["long"]).logits, expected)
        assert not torch.equal(twin(text, tasks=["long"]).logits, expected)
    assert twin.generate(text, tasks=["long"], max_new_tokens=2).shape == (1, 5)


def test_models_without_a_causal_head_are_refused() -> None:
    prompts = SoftPrompts(hidden_size=32)
    config = tiny.tiny_model("gpt2").config
    with pytest.raises(SoftPromptError, match="no language-modelling head; load the model with AutoModelForCausalLM"):
        attach(GPT2ForSequenceClassification(config), prompts)
    tiny_t5 = T5Config(vocab_size=10, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
    with pytest.raises(SoftPromptError, match="encoder-decoder"):
        attach(T5ForConditionalGeneration(tiny_t5), prompts)
    with pytest.raises(SoftPromptError, match="needs a transformers PreTrainedModel, got Linear"):
        attach(torch.nn.Linear(1, 1), prompts)


def test_prompts_of_another_base_are_refused(kind: str) -> None:
    model, other = tiny.tiny_model(kind, seed=0), tiny.tiny_model(kind, seed=1)
    prompts = SoftPrompts.for_model(other, {"a": 3})
    with pytest.raises(SoftPromptError, match="made for another base model"):
        attach(model, prompts)
    prompts.base = None
    attach(model, prompts)
    with pytest.raises(SoftPromptError, match="attached already; call detach"):
        attach(model, prompts)
    detach(model)
    narrow = SoftPrompts(hidden_size=8)
    narrow.add("a", torch.zeros(2, 8))
    with pytest.raises(SoftPromptError, match="8 wide"):
        attach(model, narrow)
    for arguments in ({"prefix": "x"}, {"prefix": True}, {"logits": "none"}):
        with pytest.raises(SoftPromptError, match=next(iter(arguments))):
            attach(model, SoftPrompts.for_model(model, {"a": 3}), **arguments)


def test_a_bfloat16_copy_of_the_base_is_the_same_base(kind: str) -> None:
    model = tiny.tiny_model(kind)
    prompts = SoftPrompts.for_model(model, {"a": 3})
    model.bfloat16().resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    attach(model, prompts)


def test_a_refused_attach_changes_nothing() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1))
    prompts = SoftPrompts.for_model(model, {"a": 2})
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(SoftPromptError, match="prefix='always' cannot be had"):
        attach(model, prompts, prefix="always")
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.training


def test_what_was_put_on_the_model_since_stays(kind: str) -> None:
    _, model, _ = attached(kind)

    def of_somebody_else(*_: object) -> str:
        return "mine"

    model.generate = of_somebody_else
    detach(model)
    assert model.generate() == "mine" and "train" not in model.__dict__
