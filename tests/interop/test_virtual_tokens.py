"""A base and its prompts as an ordinary model folder: what transformers loads answers as the attached prompts do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, Tokens, attach
from lightning_softprompt.interop import virtual_tokens
from lightning_softprompt.interop.masked_head import SMALLEST_GAP
from lightning_softprompt.interop.virtual_tokens import INDEX, export_model
from tests import tiny
from tests.interop.bases import (
    ODD,
    VOCABULARY,
    leaning_model,
    real_kinds_of_tokenizers,
    save_base,
    some_prompts,
    with_start_token,
)

TEXTS = ["a good film", "the news : so bad", "x"]
KINDS = [("llama", True), ("llama", False), ("gemma", True), ("gemma2", True), ("gemma3", True), ("gemma3", False)]
KINDS += [("gpt2", True), ("gptj", False)]


def exported(folder: Path, model, tokenizer=None, prompts: SoftPrompts | None = None):
    """The export of a model: the gap, what transformers loads, and the index."""
    base = save_base(folder / "base", model, tokenizer)
    gap = export_model(base, prompts or some_prompts(model), folder / "served")
    served = AutoModelForCausalLM.from_pretrained(folder / "served", dtype="auto")
    loaded = AutoTokenizer.from_pretrained(folder / "served")
    return gap, served, loaded, json.loads((folder / "served" / INDEX).read_text())


def greedy(model, ids: torch.Tensor, **options) -> list[int]:
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=1,
        **options,
    )
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_an_export_is_the_attached_prompts_and_the_base(kind: str, tied: bool, tmp_path) -> None:
    model = leaning_model(kind, tied)
    prompts = some_prompts(model)
    gap, served, loaded, index = exported(tmp_path, model, prompts=prompts)
    assert gap >= SMALLEST_GAP and index["gap"] == round(gap, 1)
    assert served.config.vocab_size == 128 and served.get_output_embeddings().weight.shape[0] == 128
    base_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    attach(model, prompts)
    for task in (*prompts.tasks, None):
        for text in TEXTS:
            ids = base_tokenizer(text, return_tensors="pt")["input_ids"]
            request = loaded(index["aliases"][task] + text if task else text, return_tensors="pt")["input_ids"]
            assert request[0].tolist() == [*(index["tasks"][task] if task else []), *ids[0].tolist()]
            with torch.no_grad():
                expected = model(input_ids=ids, tasks=[task]).logits[0]
                found = served(request).logits[0, -ids.shape[1] :]
            assert tiny.relative_error(found[:, :VOCABULARY], expected) < 1e-5
            assert (found[:, :VOCABULARY].amax(1) - found[:, VOCABULARY:].amax(1)).min() >= SMALLEST_GAP
            assert greedy(served, request) == greedy(model, ids, tasks=[task])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_base_in_bfloat16_stays_one(kind: str, tmp_path) -> None:
    model = leaning_model(kind).to(torch.bfloat16)
    prompts = some_prompts(model)
    _, served, loaded, index = exported(tmp_path, model, prompts=prompts)
    assert served.dtype == torch.bfloat16
    # Not the model itself, whose rotary frequencies have been cast, too.
    model = attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), prompts, prefix="never")
    ids = loaded(TEXTS[0], return_tensors="pt")["input_ids"]
    request = torch.tensor([[*index["tasks"]["trained"], *ids[0]]])
    with torch.no_grad():
        expected = model(input_ids=ids, tasks=["trained"]).logits[0].float()
        found = served(request).logits[0, -ids.shape[1] :, :VOCABULARY].float()
    assert tiny.relative_error(found, expected) < (1e-6 if kind == "llama" else 0.02)  # Gemma rounds a row twice


def test_sampling_at_temperature_2_never_gives_a_virtual_token_unless_the_head_is_tied(tmp_path) -> None:
    _, served, _, index = exported(tmp_path, leaning_model("llama"))
    rows = torch.tensor([[*index["tasks"]["trained"], 5, 6]] * 32)
    options = {"attention_mask": torch.ones_like(rows), "do_sample": True, "temperature": 2.0, "top_k": 0}

    def virtual() -> int:
        torch.manual_seed(0)
        new = served.generate(rows, max_new_tokens=32, pad_token_id=1, **options)[:, rows.shape[1] :]
        assert new.numel() == 1024
        return int((new >= VOCABULARY).sum())

    assert virtual() == 0
    with torch.no_grad():
        served.lm_head.weight[VOCABULARY:] = served.get_input_embeddings().weight[VOCABULARY:]
    assert virtual() > 100


def test_a_head_that_was_not_masked_is_refused_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    model = leaning_model("llama")
    monkeypatch.setattr(virtual_tokens, "mask_head", lambda *arguments: None)
    with pytest.raises(SoftPromptError, match=r"could give virtual tokens as text.* at least 30 is needed"):
        export_model(save_base(tmp_path / "base", model), some_prompts(model), tmp_path / "new" / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_written_is_checked(tmp_path, monkeypatch) -> None:
    model = leaning_model("gemma3")
    base, prompts = save_base(tmp_path / "base", model), some_prompts(model)
    monkeypatch.setattr(virtual_tokens, "embedding_scale", lambda model: 1.0)
    with pytest.raises(SoftPromptError, match="the prompt of 'plain' differs by"):
        export_model(base, prompts, tmp_path / "served")
    monkeypatch.undo()

    def spoiled(model, *arguments) -> None:
        model.get_output_embeddings().weight.data[3] += 1

    monkeypatch.setattr(virtual_tokens, "mask_head", spoiled)
    with pytest.raises(SoftPromptError, match="the logits of a text without a task differs by"):
        export_model(base, prompts, tmp_path / "served")


def test_ids_start_behind_the_embedding_or_the_tokenizer_whichever_is_larger(tmp_path) -> None:
    model = leaning_model("llama")
    _, served, loaded, index = exported(tmp_path / "padded", model)
    assert index["first"] == VOCABULARY and index["size"] == 128
    assert len(AutoTokenizer.from_pretrained(tmp_path / "padded" / "base")) < VOCABULARY
    assert loaded.convert_ids_to_tokens(VOCABULARY) == "<|soft0_0|>" and len(loaded) == VOCABULARY + 11
    tokenizer = with_start_token()
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(50)])
    _, served, loaded, index = exported(tmp_path / "small", model, tokenizer)
    assert index["first"] == len(tokenizer) > VOCABULARY and loaded("<extra_49>")["input_ids"] == [len(tokenizer) - 1]
    embedding = served.get_input_embeddings().weight
    assert not embedding[VOCABULARY : index["first"]].any() and not embedding[index["first"] + 11 :].any()


def test_the_order_is_prompt_start_text(tmp_path) -> None:
    model = leaning_model("llama")
    prompts = some_prompts(model)
    _, served, loaded, index = exported(tmp_path, model, with_start_token(), prompts)
    ids = with_start_token()("a film")["input_ids"]
    assert ids[0] == 0 and index["start"] == [0]
    for task in prompts.tasks:
        written = "".join(loaded.convert_ids_to_tokens([*index["tasks"][task], 0]))
        for prefix in (index["aliases"][task], written):
            assert loaded(prefix + "a film")["input_ids"] == [*index["tasks"][task], *ids]
    assert loaded("a film")["input_ids"] == ids[1:] and loaded("<bos>a film")["input_ids"] == ids
    attach(model, prompts)
    request = loaded(index["aliases"]["trained"] + "a film", return_tensors="pt")["input_ids"]
    assert greedy(served, request) == greedy(model, torch.tensor([ids]), tasks=["trained"])
    assert "begins with it written out" in " ".join((tmp_path / "served" / "README.md").read_text().split())


def test_a_task_with_a_template_is_answered_through_its_alias_and_its_chat_template(tmp_path) -> None:
    model = leaning_model("llama")
    prompts = some_prompts(model)
    prompts.templates[ODD] = TaskTemplate("so {news} is", " {label}")
    _, served, loaded, index = exported(tmp_path, model, with_start_token(), prompts)
    attach(model, prompts)
    for task, text in (("plain", "a film =>"), (ODD, "so a film is"), ("trained", "a film")):
        ids = torch.tensor([with_start_token()(text)["input_ids"]])
        expected = greedy(model, ids, tasks=[task])
        chat = [{"role": "user", "content": "a film"}]
        asked = loaded.apply_chat_template(chat, task=task, add_generation_prompt=True, return_dict=False)
        assert asked == loaded(index["aliases"][task] + text)["input_ids"] == [*index["tasks"][task], *ids[0].tolist()]
        assert greedy(served, torch.tensor([asked])) == expected


def test_the_example_of_its_readme_prints_answers_alone(tmp_path, monkeypatch, capsys) -> None:
    model = leaning_model("llama")
    _, _, loaded, _ = exported(tmp_path, model, with_start_token(), some_prompts(model))
    monkeypatch.chdir(tmp_path / "served")
    (example,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example.replace("…", "a film").replace("{text}", "a film"), "README.md", "exec"), names)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    asked = loaded(re.search(r'tokenizer\("(.*?)",', example)[1].replace("{text}", "a film"), return_tensors="pt")
    answer = names["model"].generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :]
    assert first == second == loaded.decode(answer, skip_special_tokens=True)


def test_where_transformers_makes_the_tokenizer_anew_virtual_tokens_are_written_out(tmp_path) -> None:
    tokenizer, config = real_kinds_of_tokenizers()["qwen 2"]
    model = leaning_model("qwen2", vocab_size=400)
    assert type(model.config) is type(config)
    _, _, loaded, index = exported(tmp_path, model, tokenizer)
    assert index["aliases"] == {} and index["first"] == 400
    text = "a film of the news =>"
    expected = [*index["tasks"]["plain"], *tokenizer(text)["input_ids"]]
    assert loaded("<|soft0_0|><|soft0_1|><|soft0_2|>" + text)["input_ids"] == expected
    chat = [{"role": "user", "content": "a film of the news"}]
    assert loaded.apply_chat_template(chat, task="plain", return_dict=False) == expected
    assert "<|soft0_0|><|soft0_1|><|soft0_2|>{text} =>" in (tmp_path / "served" / "README.md").read_text()


def test_shards_are_written_one_by_one_and_load_again(tmp_path, monkeypatch) -> None:
    model = leaning_model("llama", tied=False)
    base = save_base(tmp_path / "base", model)
    for path in base.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert len([*base.glob("*.safetensors")]) > 2
    monkeypatch.setattr(virtual_tokens, "_SHARD", "20KB")
    export_model(base, some_prompts(model), tmp_path / "served")
    shards = [*(tmp_path / "served").glob("*.safetensors")]
    assert len(shards) > 2
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) < 30_000
    names = set()
    for path in shards:
        with safe_open(path, "pt") as file:
            assert not names & set(file.keys())
            names |= set(file.keys())
    assert names == set(model.state_dict())


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path) -> None:
    model = leaning_model("llama")
    base = save_base(tmp_path / "base", model)
    prompts = SoftPrompts.for_model(model, {"one": Tokens([5])})
    prompts.save_pretrained(tmp_path / "prompts")
    export_model(base, tmp_path / "prompts", tmp_path / "served")
    (tmp_path / "served" / "left.txt").write_text("of the first")
    export_model(str(base), some_prompts(model), str(tmp_path / "served"))
    assert len(json.loads((tmp_path / "served" / INDEX).read_text())["tasks"]) == 3
    assert not (tmp_path / "served" / "left.txt").exists()
    with pytest.raises(SoftPromptError, match="holds something else than an earlier export"):
        export_model(base, prompts, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "prompts", "served"]


def test_what_cannot_be_exported_is_refused_by_name(tmp_path) -> None:
    model = leaning_model("llama")
    base, prompts = save_base(tmp_path / "base", model), some_prompts(model)
    with pytest.raises(SoftPromptError, match="no task"):
        export_model(base, SoftPrompts(32), tmp_path / "served")
    with pytest.raises(SoftPromptError, match="another base model"):
        export_model(base, SoftPrompts.for_model(leaning_model("gemma"), {"a": 2}), tmp_path / "served")
    with torch.no_grad():
        prompts["trained"][1, 1] = float("inf")
    with pytest.raises(SoftPromptError, match="'trained' holds NaN or Inf"):
        export_model(base, prompts, tmp_path / "served")
    with pytest.raises(SoftPromptError, match="no tokenizer could be loaded"):
        export_model(tmp_path / "gone", some_prompts(model), tmp_path / "served")
    capped = leaning_model("gemma2", final_logit_softcapping=5.0)
    with pytest.raises(SoftPromptError, match=r"the model caps its logits \(final_logit_softcapping=5.0\)"):
        export_model(save_base(tmp_path / "capped", capped), some_prompts(capped), tmp_path / "served")
    export_model(base, some_prompts(model), tmp_path / "served")
    with pytest.raises(SoftPromptError, match="it is an export itself"):
        export_model(tmp_path / "served", some_prompts(model), tmp_path / "again")
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(SoftPromptError, match="is quantized; export the base as it was before"):
        virtual_tokens.check_can_be_extended(model)
