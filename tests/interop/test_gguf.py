"""A GGUF file of a base and its prompts, read by transformers: it answers as the attached prompts do."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.interop import gguf as module
from lightning_softprompt.interop.gguf import export_gguf
from lightning_softprompt.interop.masked_head import SMALLEST_GAP
from tests import tiny
from tests.interop.bases import leaning_model, save_base, some_prompts
from tests.interop.gguf_bases import tokens, write_llama

SIZE = 70
TEXT = torch.tensor([[5, 30, 12, 44]])


def base_model(tied: bool = True) -> PreTrainedModel:
    return leaning_model("llama", tied, vocab_size=SIZE, intermediate_size=64)


def of_gguf(path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize(("tied", "kind"), [(True, Kind.F32), (False, Kind.F32), (True, Kind.Q8_0), (True, Kind.Q4_0)])
def test_the_file_answers_as_the_attached_prompts(tied: bool, kind: Kind, tmp_path) -> None:
    model = base_model(tied)
    prompts = some_prompts(model)
    write_llama(tmp_path / "base.gguf", model, kind)
    base = of_gguf(tmp_path / "base.gguf")
    if kind == Kind.F32:  # the writer of the tests is right
        with torch.no_grad():
            assert tiny.relative_error(base(TEXT).logits, model(TEXT).logits) < 1e-5
    gap = export_gguf(tmp_path / "base.gguf", prompts, tmp_path / "tasks.gguf", "f32")
    served = of_gguf(tmp_path / "tasks.gguf")
    index = json.loads((tmp_path / "tasks.gguf.json").read_text())
    assert gap >= SMALLEST_GAP and index["gap"] == round(gap, 1) and index["first"] == SIZE
    prompts.base = None
    attach(base, prompts, prefix="never")
    for task in (*prompts.tasks, None):
        ids = index["tasks"][task] if task else []
        with torch.no_grad():
            expected = base(TEXT, tasks=[task]).logits[0]
            found = served(torch.tensor([[*ids, *TEXT[0].tolist()]])).logits[0, len(ids) :]
        assert tiny.relative_error(found[:, :SIZE], expected) < 1e-5
        assert (found[:, :SIZE].amax(1) - found[:, SIZE:].amax(1)).min() >= SMALLEST_GAP


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0])
def test_a_quantized_base_stays_quantized_and_prompts_keep_eight_bits(kind: Kind, tmp_path) -> None:
    model = base_model()
    prompts = some_prompts(model)
    write_llama(tmp_path / "base.gguf", model, kind)
    gap = export_gguf(str(tmp_path / "base.gguf"), prompts, str(tmp_path / "tasks.gguf"))
    assert gap >= SMALLEST_GAP
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tasks.gguf").tensors}
    assert found["blk.0.attn_q.weight"].tensor_type == kind
    rows = dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type)[SIZE:]
    expected = torch.cat([prompts[task].detach() for task in prompts.tasks]).numpy()
    assert abs(rows - expected).max() < 0.005 * abs(expected).max()


def test_the_index_and_the_chat_template_hold_the_start_token(tmp_path) -> None:
    model = base_model()
    prompts = some_prompts(model)
    write_llama(tmp_path / "base.gguf", model, start=True)
    prompts.save_pretrained(tmp_path / "prompts")
    export_gguf(tmp_path / "base.gguf", tmp_path / "prompts", tmp_path / "tasks.gguf")
    index = json.loads((tmp_path / "tasks.gguf.json").read_text())
    assert index["start"] == [1] and index["prefixes"]["plain"] == "<|soft0_0|><|soft0_1|><|soft0_2|><s>"
    fields = gguf.GGUFReader(tmp_path / "tasks.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[index["tasks"]["plain"][0]] == "<|soft0_0|>"
    assert index["prefixes"]["plain"] in fields["tokenizer.chat_template"].contents()
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_base_is_a_way_for_what_transformers_cannot_read(tmp_path, monkeypatch) -> None:
    model = base_model()
    write_llama(tmp_path / "base.gguf", model)
    folder = save_base(tmp_path / "base", model)
    mixed = leaning_model("gptj", vocab_size=SIZE)
    other = save_base(tmp_path / "other", mixed)

    def unknown(*arguments, **options):
        raise ValueError("GGUF model with architecture llama is not supported yet.")

    monkeypatch.setattr(module, "load_causal_lm", unknown)
    with pytest.raises(SoftPromptError, match=r"transformers cannot read the llama .*; give base, the id or folder"):
        export_gguf(tmp_path / "base.gguf", some_prompts(model), tmp_path / "tasks.gguf")
    monkeypatch.undo()
    assert export_gguf(tmp_path / "base.gguf", some_prompts(model), tmp_path / "tasks.gguf", base=folder) > SMALLEST_GAP
    with pytest.raises(SoftPromptError, match="one has a bias in the head"):
        export_gguf(tmp_path / "base.gguf", some_prompts(mixed), tmp_path / "tasks.gguf", base=other)


def test_what_cannot_be_exported_is_refused(tmp_path) -> None:
    model = base_model()
    write_llama(tmp_path / "base.gguf", model, Kind.Q4_0)
    with pytest.raises(SoftPromptError, match="dtype must be one of 'f32', got 'f16'"):
        export_gguf(tmp_path / "base.gguf", some_prompts(model), tmp_path / "tasks.gguf", "f16")
    with pytest.raises(SoftPromptError, match="no task"):
        export_gguf(tmp_path / "base.gguf", SoftPrompts(32), tmp_path / "tasks.gguf")
    stranger = SoftPrompts.for_model(tiny.tiny_model("gpt2"), {"one": Tokens([5])})
    with pytest.raises(SoftPromptError, match="made for another base model"):
        export_gguf(tmp_path / "base.gguf", stranger, tmp_path / "tasks.gguf")
    wide = SoftPrompts(48)
    wide.add("one", torch.zeros(2, 48))
    with pytest.raises(SoftPromptError, match="width 48"):
        export_gguf(tmp_path / "base.gguf", wide, tmp_path / "tasks.gguf")
    whole = (tmp_path / "base.gguf").read_bytes()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "base.gguf")
    (tmp_path / "json.gguf.json").mkdir()
    for output, said in {
        "base.gguf": "is the GGUF file of the base, which would be lost",
        "link.gguf": "is the GGUF file of the base, which would be lost",
        ".": "is a folder; give the name of a file in it",
        "base.gguf/tasks.gguf": "cannot be written",
        "json.gguf": "cannot be written",
    }.items():
        with pytest.raises(SoftPromptError, match=said):
            export_gguf(tmp_path / "base.gguf", some_prompts(model), tmp_path / output)
    assert (tmp_path / "base.gguf").read_bytes() == whole
    assert not (tmp_path / "tasks.gguf").exists() and tokens(SIZE)[-1].startswith("<filler")
