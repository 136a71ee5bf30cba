"""Types of models that differ from the others in what they take and put out: as the bare one, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

from lightning_softprompt import SoftPromptError, attach
from tests import tiny
from tests.attachment.helpers import assert_rows_equal, hard_prompts, inputs
from tests.conformance import generation, models

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(bare: PreTrainedModel, prefix: str = "auto") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A bare model and an attached copy."""
    model = copy.deepcopy(bare)
    return bare, attach(model, hard_prompts(model), prefix=prefix)


def of_rows(batch: tiny.Batch, outputs: Any, name: str, layer: int) -> list[Tensor]:
    """One layer's output at each row's text."""
    values = getattr(outputs, name)[layer]
    return [values[i, batch.start[i] : batch.start[i] + len(row.text)] for i, row in enumerate(batch.rows)]


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt", "ctrl", "bert", "roberta", "xlnet", "big_bird"])
def test_a_prompt_has_the_type_of_its_rows_first_token(model_type: str, side: str) -> None:
    bare, model = pair(models.build(model_type))
    batch = tiny.random_batch(1, side)
    kinds = torch.zeros_like(batch.input_ids)
    for index, row in enumerate(batch.rows):
        half = batch.start[index] + len(row.text) // 2
        kinds[index, :half], kinds[index, half:] = index % 2, 1
    with torch.no_grad():
        logits = model(**inputs(batch), token_type_ids=kinds).logits
        for index, row in enumerate(batch.rows):
            columns = slice(batch.start[index], batch.start[index] + len(row.text))
            own = kinds[index, columns]
            alone = torch.cat([own[:1].expand(len(row.prompt)), own])[None]
            expected = bare(torch.tensor([row.prompt + row.text]), token_type_ids=alone).logits[0, len(row.prompt) :]
            assert tiny.relative_error(logits[index, columns], expected) < 1e-5


@pytest.mark.parametrize("prefix", ["auto", "never"])
def test_positions_of_several_kinds(side: str, prefix: str) -> None:
    """Qwen2.5-VL generates with one row of positions for the text, and one for time, height and width."""
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**sizes, "num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.3}
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32)
    tokens = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    torch.manual_seed(0)
    bare = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)).eval()
    bare.generation_config.eos_token_id, bare.generation_config.pad_token_id = None, 1
    bare, model = pair(bare, prefix)
    batch = tiny.random_batch(2, side)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for given in ({}, {"position_ids": positions.expand(3, -1, -1)}):
            nothing = torch.zeros_like(batch.input_ids)
            assert_rows_equal(bare, batch, model(**inputs(batch), mm_token_type_ids=nothing, **given).logits)
        generation.padded(bare, model, side)


def test_attentions_of_other_shapes() -> None:
    bare, model = pair(models.build("rwkv"))
    batch = tiny.random_batch(3, "left")
    with torch.no_grad():
        found = of_rows(batch, model(**inputs(batch), output_attentions=True), "attentions", 1)
        for row, mine in zip(batch.rows, found, strict=True):
            alone = bare(torch.tensor([row.prompt + row.text]), output_attentions=True).attentions[1][0]
            assert tiny.relative_error(mine, alone[len(row.prompt) :]) < 1e-5
        bare, model = pair(models.build("minimax"))
        with pytest.raises(SoftPromptError, match="MiniMaxForCausalLM gives no attentions"):
            model(**inputs(batch), output_attentions=True)
        model.set_attn_implementation("eager")
        out = model(**inputs(batch), output_attentions=True)
        assert_rows_equal(bare, batch, out.logits)
        assert "linear_attention" in model.config.layer_types and len(out.attentions) == len(model.config.layer_types)
        _, model = pair(models.build("reformer"))
        with pytest.raises(SoftPromptError, match=r"ReformerModelWithLMHead puts out attentions .* chunks"):
            model(**inputs(batch), output_attentions=True)
        _, model = pair(models.build("falcon"))
        with pytest.raises(SoftPromptError, match="FalconForCausalLM gives no attentions"):
            model(**inputs(batch), output_attentions=True)
        bare, model = pair(type(model)._from_config(model.config, attn_implementation="eager").eval())
        assert_rows_equal(bare, batch, model(**inputs(batch), output_attentions=True).logits)


def test_a_state_that_is_written_in_place_is_not_kept_where_prompts_train(side: str) -> None:
    bare, model = pair(models.build("rwkv"))
    batch = tiny.random_batch(4, side)
    model(**inputs(batch, labels=True)).loss.backward()
    leaf = bare.get_input_embeddings()(torch.tensor([tiny.HARD["long"]])).detach().requires_grad_()
    total, count = torch.zeros(()), 0
    for row in batch.rows:
        count += len(row.text) - (0 if row.prompt else 1)
        if row.task == 0:
            text = bare.get_input_embeddings()(torch.tensor([row.text])).detach()
            logits = bare(inputs_embeds=torch.cat([leaf, text], 1), use_cache=False).logits[0, len(row.prompt) - 1 : -1]
            total = total + nn.functional.cross_entropy(logits, torch.tensor(row.text), reduction="sum")
    (total / count).backward()
    assert tiny.relative_error(model.soft_prompts["long"].grad, leaf.grad[0]) < 1e-5


def test_prompts_that_cannot_train_say_so() -> None:
    _, model = pair(models.build("reformer"))
    with pytest.raises(SoftPromptError, match="prompts of ReformerModelWithLMHead cannot be trained"):
        model(**inputs(tiny.random_batch(0, "left"), labels=True)).loss.backward()


def test_a_causal_mask_that_hides_no_pads(side: str) -> None:
    torch.manual_seed(0)
    config = XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_index=1)
    bare, model = pair(XLMWithLMHeadModel(config).eval())
    with torch.no_grad():
        for seed in range(3):
            batch = tiny.random_batch(seed, side)
            assert_rows_equal(bare, batch, model(**inputs(batch)).logits)


def test_a_loss_that_is_none_of_a_text_is_refused() -> None:
    _, model = pair(models.build("git"))
    batch = tiny.random_batch(0, "right")
    with pytest.raises(SoftPromptError, match="GitForCausalLM takes no labels of rows with prompts"):
        model(**inputs(batch, labels=True))
    images = torch.zeros(6, 3, *[model.config.vision_config.image_size] * 2)
    with pytest.raises(SoftPromptError, match=r"GitForCausalLM was given .* give it text alone"):
        model(**inputs(batch), pixel_values=images)


def test_ids_that_the_model_looks_up_as_others() -> None:
    """Gemma 4 unified takes the id of an image for a pad."""
    bare = models.build("gemma4_unified")
    bare.config.image_token_id = 50
    bare, model = pair(bare)
    batch = tiny.random_batch(5, "left")
    for index, row in enumerate(batch.rows):
        row.text[-1] = bare.config.image_token_id
        batch.input_ids[index, -1] = bare.config.image_token_id
    with torch.no_grad():
        assert_rows_equal(bare, batch, model(**inputs(batch)).logits)


@pytest.mark.parametrize("case", ["model", "layers"])
def test_a_base_without_weights_is_refused(case: str) -> None:
    model = tiny.tiny_model("llama")
    prompts = hard_prompts(model)
    (model if case == "model" else model.model.layers).to("meta")
    with pytest.raises(SoftPromptError, match=r"of LlamaForCausalLM (is|are) on the meta device; load (it|them) first"):
        attach(model, prompts)
    with pytest.raises(SoftPromptError, match="on the meta device"):
        hard_prompts(model)


def test_layers_may_be_offloaded_and_the_embedding_may_not(tmp_path: Path) -> None:
    bare, model = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    on_disk = {f"model.layers.{layer}": "disk" for layer in range(2)}
    model = dispatch_model(model, places | on_disk, main_device="cpu", offload_dir=str(tmp_path))
    assert next(model.model.layers.parameters()).is_meta
    attach(model, hard_prompts(model))
    batch = tiny.random_batch(0, "left")
    out = model(**inputs(batch, labels=True))
    assert_rows_equal(bare, batch, out.logits)
    out.loss.backward()
    assert model.soft_prompts["long"].grad.norm() > 0.1
    generation.padded(bare, model, "left")
    whole = tiny.tiny_model("llama")
    cpu_offload(whole, execution_device=torch.device("cpu"))
    with pytest.raises(SoftPromptError, match="embedding of LlamaForCausalLM is offloaded; keep it on a device"):
        hard_prompts(whole)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_text_that_is_read_both_ways_without_a_mask(implementation: str) -> None:
    """PaliGemma, and Gemma where its configuration says so, with sdpa (transformers 5.23)."""
    config = GemmaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config.use_bidirectional_attention = True
    bare = GemmaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    if implementation == "sdpa":
        with pytest.raises(SoftPromptError, match="GemmaForCausalLM cannot take soft prompts: without a mask it looks"):
            pair(bare)
        return
    bare, model = pair(bare)
    batch = tiny.random_batch(0, "left")
    with torch.no_grad():
        assert_rows_equal(bare, batch, model(**inputs(batch)).logits)
