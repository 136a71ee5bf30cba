"""Prompts as rows of an embedding: places, scale, and a head of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_softprompt import SoftPromptError, SoftPrompts
from lightning_softprompt.interop.virtual_rows import (
    VirtualRows,
    append_rows,
    check_can_be_extended,
    embedding_scale,
    packed_rows,
)
from tests import tiny
from tests.interop.bases import VOCABULARY, leaning_model, some_prompts


def test_places_are_behind_all_that_is_known_and_fill_blocks() -> None:
    prompts = some_prompts(leaning_model())
    rows = VirtualRows.behind(VOCABULARY, prompts)
    places = [id for ids in rows.ids.values() for id in ids]
    assert places == [*range(VOCABULARY, VOCABULARY + 11)] and tuple(rows.ids) == prompts.tasks
    assert (rows.known, rows.first, rows.size) == (VOCABULARY, VOCABULARY, 128)
    assert VirtualRows.behind(VOCABULARY, prompts, named=70).first == 70
    assert VirtualRows.behind(VOCABULARY, prompts, block=1).size == VOCABULARY + 11
    assert VirtualRows.behind(64 - 11, prompts).size == 64 and VirtualRows.behind(64 - 10, prompts).size == 128
    assert rows.names("trained") == [f"<|soft1_{place}|>" for place in range(6)]


@pytest.mark.parametrize(("kind", "scale"), [("llama", 1.0), ("gpt2", 1.0), ("gemma", 32**0.5), ("gemma3", 32**0.5)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_puts_out_the_prompts_and_the_head_is_the_model_s_own(kind: str, scale: float, tied) -> None:
    model = leaning_model(kind, tied)
    prompts = some_prompts(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    assert embedding_scale(model) == pytest.approx(scale, rel=1e-5)
    rows = VirtualRows.behind(VOCABULARY, prompts, named=65)
    append_rows(model, rows, packed_rows(prompts, embedding_scale(model)))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for task in prompts.tasks:
        assert torch.allclose(embedding(torch.tensor(rows.ids[task])), prompts[task], rtol=1e-5, atol=1e-6)
    assert embedding.weight.data_ptr() != head.weight.data_ptr() and not model.config.tie_word_embeddings
    assert not head.weight[VOCABULARY:].any() and not embedding.weight[VOCABULARY:65].any()
    assert not embedding.weight[65 + 11 :].any()
    with torch.no_grad():
        # A head of more rows is a product of another shape, which may round otherwise.
        assert tiny.relative_error(model(ids).logits[..., :VOCABULARY], before) < 1e-5


def test_values_that_cannot_be_rows_are_refused() -> None:
    model = leaning_model().half()
    prompts = SoftPrompts(32)
    prompts.add("huge", torch.full((2, 32), 1e6))
    with pytest.raises(SoftPromptError, match=r"a prompt holds values that torch\.float16 cannot"):
        append_rows(model, VirtualRows.behind(VOCABULARY, prompts), packed_rows(prompts, 1.0))


def test_other_embeddings_and_heads_are_refused_by_name() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    class NormedHead(nn.Linear):
        def forward(self, states):
            return nn.functional.linear(states, nn.functional.normalize(self.weight))

    model = leaning_model()
    model.set_input_embeddings(Shifted(VOCABULARY, 32))
    with pytest.raises(SoftPromptError, match="the embedding of LlamaForCausalLM does more to a row"):
        embedding_scale(model)
    model = leaning_model()
    model.set_output_embeddings(NormedHead(32, VOCABULARY, bias=False))
    with pytest.raises(SoftPromptError, match=r"the head of LlamaForCausalLM is NormedHead \[61, 32\]"):
        check_can_be_extended(model)
    model.set_output_embeddings(nn.Linear(32, 60))
    with pytest.raises(SoftPromptError, match=r"one row an id \(61 ids\)"):
        check_can_be_extended(model)
    model.set_input_embeddings(nn.EmbeddingBag(VOCABULARY, 32))
    with pytest.raises(SoftPromptError, match="is a EmbeddingBag"):
        check_can_be_extended(model)
