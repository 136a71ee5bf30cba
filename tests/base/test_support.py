"""Which models can take soft prompts, and what is said of those that cannot."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForMaskedLM, ReformerConfig, ReformerModelWithLMHead

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base import support
from lightning_softprompt.base.support import check_model, has_language_modelling_head
from tests import tiny


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_lm_is_taken_and_what_is_inside_it_is_not(kind: str) -> None:
    model = tiny.tiny_model(kind)
    check_model(model)
    assert has_language_modelling_head(model) and not has_language_modelling_head(model.base_model)
    with pytest.raises(SoftPromptError, match="Model has no language-modelling head; load the model with"):
        check_model(model.base_model)


def test_a_head_that_fills_gaps_is_none_and_neither_is_generation_without_a_head(monkeypatch) -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    masked = BertForMaskedLM(config)
    assert masked.get_output_embeddings() is not None and not has_language_modelling_head(masked)
    model = tiny.tiny_model()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert model.can_generate() and not has_language_modelling_head(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_model_inside_another_is_refused_with_the_way_out() -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    adapted = get_peft_model(tiny.tiny_model(), config)
    with pytest.raises(SoftPromptError, match=r"got PeftModelForCausalLM; of a PEFT model, .*get_base_model\(\)"):
        check_model(adapted)
    check_model(adapted.get_base_model())
    with pytest.raises(SoftPromptError, match="got OptimizedModule; attach first, then compile"):
        check_model(torch.compile(tiny.tiny_model(), backend="eager"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_wrapper_that_calls_the_model_past_its_hooks_is_refused(monkeypatch) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"])
    wrapped, loaded = (get_peft_model(tiny.tiny_model(), config).get_base_model() for _ in range(2))
    loaded._hf_peft_config_loaded = True  # as `load_adapter` of transformers leaves it, which has no wrapper
    check_model(wrapped)
    monkeypatch.setattr(support, "version", lambda package: {"peft": "0.20.0"}[package])
    check_model(loaded)
    with pytest.raises(SoftPromptError, match=r"PEFT 0.20.0 calls a LlamaForCausalLM .* install peft>=0.21"):
        check_model(wrapped)


def test_a_type_that_cannot_take_prompts_is_refused_by_name() -> None:
    config = ReformerConfig(
        attn_layers=["lsh"],
        is_decoder=True,
        hidden_size=8,
        vocab_size=9,
        num_attention_heads=2,
        attention_head_size=4,
        feed_forward_size=8,
        axial_pos_embds=False,
        max_position_embeddings=16,
        num_buckets=2,
    )
    with pytest.raises(SoftPromptError, match="ReformerModelWithLMHead cannot take soft prompts: what its hashes of"):
        check_model(ReformerModelWithLMHead(config))
