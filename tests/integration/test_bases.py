"""Bases as people have them: quantized, compiled, checkpointed, tied, resized, with a LoRA; heads that are refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from tests import tiny

ROOT = Path(__file__).parents[2]


def hard_prompts(model: nn.Module) -> SoftPrompts:
    return SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})


def inputs(batch: tiny.Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}


def require_exact(model: nn.Module, bare: nn.Module, forward: nn.Module | None = None) -> SoftPrompts:
    """Logits and greedy tokens of mixed batches are those of the bare base on each row alone, and prompts train."""
    prompts = hard_prompts(model)
    attach(model, prompts)
    for seed, side in ((0, "left"), (1, "right"), (2, "left")):
        batch = tiny.random_batch(seed, side)
        out = (model if forward is None else forward)(**inputs(batch), labels=batch.labels)
        for index, row in enumerate(batch.rows):
            found = out.logits.detach()[index, batch.start[index] : batch.start[index] + len(row.text)]
            assert tiny.relative_error(found, tiny.hard_row(bare, row)) < 1e-5
        out.loss.backward()
    assert all(prompts[task].grad.norm() > 0.1 and prompts[task].dtype == torch.float32 for task in prompts)
    batch = tiny.random_batch(0, "left")
    ids = model.generate(**inputs(batch), max_new_tokens=4, do_sample=False)
    for index, row in enumerate(batch.rows):
        new = ids[index, batch.input_ids.shape[1] :].tolist()
        assert new == tiny.hard_greedy(bare, row, 4, do_sample=False)[0]
    return prompts


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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_layers_and_leaves_dropout_off(reentrant: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=tiny.VOCABULARY, **sizes, num_attention_heads=4, dropout=0.5, init_std=0.3)
    model = OPTForCausalLM(config)
    model.generation_config.eos_token_id = None
    bare = copy.deepcopy(model).eval()
    runs = []
    for layer in model.model.decoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    prompts = require_exact(model, bare)
    without = {task: prompts[task].grad.clone() for task in prompts}
    prompts.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # after attach, and in eval mode
    for seed, side in ((0, "left"), (1, "right"), (2, "left")):
        batch = tiny.random_batch(seed, side)
        runs.clear()
        out = model(**inputs(batch), labels=batch.labels)
        assert len(runs) == 2 and not any(module.training for module in model.model.modules())
        out.loss.backward()
        assert len(runs) == 4, "each layer runs once more, in the backward pass"
        assert not any(module.training for module in model.model.modules())
        assert out.past_key_values is None
    for task in prompts:
        assert tiny.relative_error(prompts[task].grad, without[task]) < 1e-5
    runs.clear()
    with torch.no_grad():  # nothing to recompute, and a cache to keep
        assert model(**inputs(batch)).past_key_values is not None
    assert len(runs) == 2


def test_checkpointing_survives_an_interrupted_pass() -> None:
    model = tiny.tiny_model()
    bare = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    prompts = hard_prompts(model)
    attach(model, prompts)
    batch = tiny.random_batch(0, "left")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs(batch))
    handle.remove()
    out = model(**inputs(batch), labels=batch.labels)
    out.loss.backward()
    assert not any(module.training for module in model.model.modules())
    row = batch.rows[0]
    found = out.logits.detach()[0, batch.start[0] : batch.start[0] + len(row.text)]
    assert tiny.relative_error(found, tiny.hard_row(bare, row)) < 1e-5


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
