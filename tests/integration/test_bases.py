"""Bases as people have them: quantized, compiled, tied, resized, with a LoRA; heads that are refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from lightning_softprompt import SoftPromptError, SoftPrompts, attach
from tests import tiny
from tests.attachment.helpers import hard_prompts, inputs, require_exact

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_torchao_int8_weights(kind: str, tmp_path: Path) -> None:
    tiny.tiny_model(kind).save_pretrained(tmp_path)
    # A process of its own: torchao lies beside the environment, as transformers imports it wherever it finds it.
    code = f"from {__name__} import require_int8_weights; require_int8_weights({kind!r}, {str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(sys.prefix) / "torchao"), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=True)


def require_int8_weights(kind: str, folder: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        )
        model.generation_config.eos_token_id = None
        quantized.append(model.eval())
    if kind == "llama":
        assert type(quantized[0].model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    prompts = require_exact(*quantized)
    assert isinstance(prompts["long"], nn.Parameter) and prompts["long"].requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="4-bit weights need a GPU")
def test_bitsandbytes_4_bit(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.tiny_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": 0})
    hard = {i: model(torch.tensor([[*ids, 9, 8, 7]]).cuda()).logits[0, -3:] for i, ids in enumerate(tiny.HARD.values())}
    prompts = hard_prompts(model)
    out = attach(model, prompts)(torch.tensor([[9, 8, 7]] * 3).cuda(), task_ids=torch.arange(3))
    for task, logits in hard.items():
        assert tiny.relative_error(out.logits[task], logits) < 1e-2
    out.logits.square().mean().backward()
    assert all(prompts[task].grad.norm() > 0 for task in prompts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["torch.compile", "model.compile", "a layer"])
@pytest.mark.compiles
def test_a_compiled_base(what: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny.tiny_model()
    bare, forward = copy.deepcopy(model), model
    if what == "torch.compile":
        forward = torch.compile(model, backend="aot_eager", dynamic=True)
    elif what == "model.compile":
        model.compile(backend="aot_eager", dynamic=True)
    else:
        model.model.layers[0].compile(backend="aot_eager", dynamic=True)
    require_exact(model, bare, forward)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


def test_what_torch_compile_returns_is_not_attached_to() -> None:
    model = tiny.tiny_model()
    with pytest.raises(SoftPromptError, match="attach first, then compile"):
        attach(torch.compile(model, backend="eager"), hard_prompts(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied: bool) -> None:
    model = tiny.tiny_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    require_exact(model, copy.deepcopy(model))


def test_a_resized_vocabulary() -> None:
    model = tiny.tiny_model()
    model.resize_token_embeddings(tiny.VOCABULARY + 7, mean_resizing=False)
    bare = copy.deepcopy(model)
    prompts = require_exact(model, bare)
    # Prompts made before the vocabulary grew are still those of this base; and it may grow while attached.
    model.resize_token_embeddings(tiny.VOCABULARY + 9, mean_resizing=False)
    bare.resize_token_embeddings(tiny.VOCABULARY + 9, mean_resizing=False)
    batch = tiny.random_batch(0, "left")
    logits = model(**inputs(batch)).logits.detach()
    for index, row in enumerate(batch.rows):
        found = logits[index, batch.start[index] : batch.start[index] + len(row.text), : tiny.VOCABULARY]
        assert tiny.relative_error(found, tiny.hard_row(bare, row)[:, : tiny.VOCABULARY]) < 1e-5
    assert prompts.base is not None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_base_inside_a_lora() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.tiny_model(), config).eval()
    model.generation_config.eos_token_id = None
    bare = copy.deepcopy(model)
    with pytest.raises(SoftPromptError, match="get_base_model"):
        attach(model, hard_prompts(model.get_base_model()))
    require_exact(model.get_base_model(), bare)
    batch = tiny.random_batch(0, "left")  # and through PEFT's own wrapper
    mixed = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    tasks = [tiny.TASKS[row.task] if row.task >= 0 else None for row in batch.rows]
    logits = model(**mixed, tasks=tasks).logits
    assert torch.equal(logits, model.get_base_model()(**inputs(batch)).logits)
    with pytest.raises(SoftPromptError, match="nothing says which row is which"):
        model(**inputs(batch))  # PEFT keeps task_ids to itself: nothing silent about it


def test_a_classification_head_is_refused_with_a_pointer() -> None:
    model = LlamaForSequenceClassification(tiny.tiny_model().config)
    with pytest.raises(SoftPromptError, match=r"LlamaForSequenceClassification has no language-modelling head.*rank"):
        attach(model, SoftPrompts(32))
