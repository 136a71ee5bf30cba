"""The mask of virtual tokens: below every other logit on what it was not made from, or refused."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptError
from lightning_softprompt.interop import masked_head
from lightning_softprompt.interop.masked_head import SMALLEST_GAP, mask_head, measure_gap, probe_rows
from lightning_softprompt.interop.virtual_rows import VirtualRows, append_rows, embedding_scale, packed_rows
from tests import tiny
from tests.interop.bases import VOCABULARY, WORDS, leaning_model, some_prompts
from tests.tokenizer import word_tokenizer


def extended(model) -> VirtualRows:
    prompts = some_prompts(model)
    rows = VirtualRows.behind(VOCABULARY, prompts)
    append_rows(model, rows, packed_rows(prompts, embedding_scale(model)))
    return rows


def texts(model, rows: VirtualRows, held_out: bool) -> list[list[int]]:
    return probe_rows(model, word_tokenizer(WORDS), rows, held_out)


def test_what_is_held_out_is_not_what_was_fitted_and_has_every_task(monkeypatch) -> None:
    model = leaning_model()
    rows = extended(model)
    fitted, held = texts(model, rows, False), texts(model, rows, True)
    assert texts(model, rows, True) == held
    long = [{tuple(ids) for ids in each if len(set(ids)) > 8} for each in (fitted, held)]
    assert long[0] and long[1] and not long[0] & long[1]
    for each in (fitted, held):
        for ids in rows.ids.values():
            assert any(row[: len(ids)] == ids and len(row) > len(ids) for row in each)
        assert max(map(len, each)) <= 128
    monkeypatch.setattr(masked_head, "_FITTED_TASKS", 1)
    assert not any(row[0] in rows.ids["trained"] for row in texts(model, rows, False))
    assert any(row[0] in rows.ids["trained"] for row in texts(model, rows, True))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gptj"])
def test_the_gap_is_what_the_logits_have(kind: str) -> None:
    model = leaning_model(kind)
    rows = extended(model)
    with pytest.raises(SoftPromptError, match="at least 30 is needed"):
        measure_gap(model, word_tokenizer(WORDS), rows)
    mask_head(model, word_tokenizer(WORDS), rows)
    held = texts(model, rows, True)
    gap = measure_gap(model, word_tokenizer(WORDS), rows)
    smallest = float("inf")
    with torch.no_grad():
        for ids in held:
            logits = model(torch.tensor([ids])).logits[0]
            smallest = min(smallest, float((logits[:, :VOCABULARY].amax(1) - logits[:, VOCABULARY:].amax(1)).min()))
    assert gap == pytest.approx(smallest, abs=1e-2) and gap >= SMALLEST_GAP
    head = model.get_output_embeddings()
    assert (head.bias is not None) == (kind == "gptj")
    if kind == "gptj":
        assert not head.weight[VOCABULARY:].any() and set(head.bias[VOCABULARY:].tolist()) == {-1000.0}
    assert not hasattr(head, "_forward_pre_hooks") or not head._forward_pre_hooks


def test_states_that_point_everywhere_are_refused() -> None:
    model = tiny.tiny_model("llama")
    rows = extended(model)
    mask_head(model, word_tokenizer(WORDS), rows)
    with pytest.raises(SoftPromptError, match="its states have no direction in common"):
        measure_gap(model, word_tokenizer(WORDS), rows)
