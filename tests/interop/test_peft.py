"""Adapters of real PEFT, read and written: the same logits on unpadded rows."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate, attach
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.interop.peft import CONFIG, OWN, TEMPLATE, TENSORS, export_peft, import_peft
from lightning_softprompt.prompts.characters import has_control
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]
TEXT = torch.tensor([[9, 8, 7, 6], [5, 4, 3, 2]])


def logits_of(prompts: SoftPrompts, task: str) -> torch.Tensor:
    model = attach(tiny.tiny_model(), prompts)
    with torch.no_grad():
        return model(TEXT, tasks=[task] * len(TEXT)).logits


def peft_logits(model, length: int, **options) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TEXT, attention_mask=torch.ones_like(TEXT), **options).logits[:, length:]


@pytest.mark.parametrize("several", [False, True])
def test_what_is_exported_acts_in_peft_as_here(several: bool, tmp_path) -> None:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {"情感 v1.0": 5, "other": 3})
    names = ["情感 v1.0", "other"] if several else "情感 v1.0"
    export_peft(prompts, names, tmp_path)
    for task in names if several else [names]:
        folder = tmp_path / task if several else tmp_path
        theirs = PeftModel.from_pretrained(tiny.tiny_model(), folder)
        length = len(prompts[task])
        assert tiny.relative_error(peft_logits(theirs, length), logits_of(copy.deepcopy(prompts), task)) < 1e-5
        back = import_peft(folder)
        assert back.tasks == (task,) and torch.equal(back[task], prompts[task])


def trained(config, **options):
    """A model of PEFT whose adapter has taken some steps."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.tiny_model(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(TEXT, attention_mask=torch.ones_like(TEXT), labels=TEXT, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB", "P_TUNING", "P_TUNING_LSTM"])
def test_what_peft_trained_acts_here_as_there(init: str, tmp_path) -> None:
    if init.startswith("P_TUNING"):
        kind = "LSTM" if init.endswith("LSTM") else "MLP"
        config = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=4,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=16,
        )
    else:
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, prompt_tuning_init=init)
    model = trained(config)
    model.save_pretrained(tmp_path / "theirs")
    prompts = import_peft(tmp_path / "theirs")
    assert prompts.tasks == ("theirs",)
    assert tiny.relative_error(logits_of(prompts, "theirs"), peft_logits(model, 4)) < 1e-5


def test_tasks_of_multitask_prompt_tuning_become_tasks(tmp_path) -> None:
    config = MultitaskPromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, num_tasks=2, num_ranks=2)
    model = trained(config, task_ids=torch.tensor([0, 1]))
    model.save_pretrained(tmp_path)
    prompts = import_peft(tmp_path, "task")
    assert prompts.tasks == ("task0", "task1")
    for number in range(2):
        expected = peft_logits(model, 4, task_ids=torch.tensor([number, number]))
        assert tiny.relative_error(logits_of(copy.deepcopy(prompts), f"task{number}"), expected) < 1e-5


def test_other_folders_are_refused(tmp_path) -> None:
    with pytest.raises(SoftPromptError, match=r"no adapter_config\.json"):
        import_peft(tmp_path)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    get_peft_model(tiny.tiny_model(), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(SoftPromptError, match="'PREFIX_TUNING', which is not a prompt"):
        import_peft(tmp_path / "prefix")
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"a": 3})
    export_peft(prompts, "a", tmp_path / "a")
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-5])
    with pytest.raises(SoftPromptError, match="damaged"):
        import_peft(tmp_path / "a")
    tensors.write_bytes(whole)
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**told, "num_virtual_tokens": 4}))
    with pytest.raises(SoftPromptError, match="of 4 tokens, found \\[3, 32\\]"):
        import_peft(tmp_path / "a")
    with pytest.raises(SoftPromptError, match="unknown task"):
        export_peft(prompts, "b", tmp_path / "b")
    with pytest.raises(SoftPromptError, match="unknown task"):
        export_peft(prompts, ["a", "b"], tmp_path / "b")
    with torch.no_grad():
        prompts["a"].fill_(torch.nan)
    with pytest.raises(SoftPromptError, match="NaN"):
        export_peft(prompts, "a", tmp_path / "nan")
    assert not (tmp_path / "b").exists() and not (tmp_path / "nan").exists()


TONE = TaskTemplate("{text}\n=>", " {tone}", [" good", " bad"])


def test_a_template_goes_with_its_prompt(tmp_path) -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": 3})
    prompts.templates["tone"] = TONE
    export_peft(prompts, "tone", tmp_path)
    assert import_peft(tmp_path).templates == {"tone": TONE}
    assert import_peft(tmp_path, "mood").templates == {"mood": TONE}
    length = len(prompts["tone"])
    theirs = PeftModel.from_pretrained(tiny.tiny_model(), tmp_path)
    assert tiny.relative_error(peft_logits(theirs, length), logits_of(copy.deepcopy(prompts), "tone")) < 1e-5
    del prompts.templates["tone"]
    export_peft(prompts, "tone", tmp_path)
    assert not import_peft(tmp_path).templates
    prompts.templates["tone"] = TaskTemplate("{text")
    with pytest.raises(SoftPromptError, match=r"task 'tone': the template '\{text' has unbalanced braces"):
        export_peft(prompts, "tone", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def exported(folder, base: str | Path, task: str = "tone") -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {task: 3})
    prompts.templates[task] = TONE
    export_peft(prompts, task, folder, base)


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ("some/base", "some/base", True),
        ("another/base", "some/base", False),
        ("some/other", "some/base", False),
        ("/models/base", "some/base", True),
        ("gpt2", "openai-community/gpt2", True),
        ("/models/base", "/data/base", True),
        (Path("/models/base"), "/data/base", True),
        ("/models/other", "some/base", False),
        ("", "some/base", True),
        ("some/base", "", True),
    ],
)
def test_an_adapter_of_another_base_is_refused(theirs: str | Path, ours: str, fits: bool, tmp_path) -> None:
    exported(tmp_path, theirs)
    base = dataclasses.replace(BaseModel.of(tiny.tiny_model()), name=ours)
    assert import_peft(tmp_path).base is None
    if fits:
        assert import_peft(tmp_path, base=base).base == base
        return
    with pytest.raises(SoftPromptError) as caught:
        import_peft(tmp_path, base=base)
    for word in (str(tmp_path), repr(theirs), repr(ours)):
        assert word in str(caught.value)


def test_an_adapter_of_another_width_is_refused(tmp_path) -> None:
    exported(tmp_path, "")
    with pytest.raises(SoftPromptError, match=r"\(width 32\), than 'some/base' \(width 8\)"):
        import_peft(tmp_path, base=BaseModel("some/base", 8, (), ()))


def spoil(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGED = {
    "NaN": (TENSORS, lambda p: spoil(p, lambda t: t["prompt_embeddings"].fill_(torch.nan)), "finite"),
    "whole numbers": (
        TENSORS,
        lambda p: spoil(p, lambda t: t.update(prompt_embeddings=torch.ones(3, 2).int())),
        "finite",
    ),
    "no tensors": (TENSORS, lambda p: p.write_bytes(b"x\x1b[2J"), "is damaged"),
    "no JSON": (CONFIG, lambda p: p.write_text("{"), "is damaged"),
    "a list": (CONFIG, lambda p: p.write_text("[]"), "not the config"),
    "own is no JSON": (OWN, lambda p: p.write_text("{"), "is damaged"),
    "own is a list": (OWN, lambda p: p.write_text("[]"), "non-empty text, got None; give the task's name"),
    "own is a path": (OWN, lambda p: p.write_text('{"task": "../\\u001b"}'), "no path separators"),
    "template is no JSON": (TEMPLATE, lambda p: p.write_bytes(b"\xff"), "is damaged"),
    "template is a list": (TEMPLATE, lambda p: p.write_text("[]"), "must have the fields text"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_errors_name_the_file(case: str, tmp_path) -> None:
    exported(tmp_path, "some/base")
    name, change, message = DAMAGED[case]
    change(tmp_path / name)
    with pytest.raises(SoftPromptError, match=message) as caught:
        import_peft(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name)) and not has_control(str(caught.value))


def test_a_name_that_no_task_can_have_is_no_fault_of_the_folder(tmp_path) -> None:
    exported(tmp_path, "some/base")
    with pytest.raises(SoftPromptError, match=r"^a task name has no path separators"):
        import_peft(tmp_path, task="a/b")


@pytest.mark.parametrize("wrong", ["peft_type", "task_type", "num_virtual_tokens"])
def test_values_of_a_config_reach_no_terminal(wrong: str, tmp_path) -> None:
    exported(tmp_path, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, wrong: "\x1b[2J"}))
    with pytest.raises(SoftPromptError, match=r"x1b\[2J") as caught:
        import_peft(tmp_path)
    assert not has_control(str(caught.value))


def test_factors_that_do_not_fit_are_named(tmp_path) -> None:
    exported(tmp_path, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "peft_type": "MULTITASK_PROMPT_TUNING"}))
    with pytest.raises(SoftPromptError, match=r"adapter_model\.safetensors cannot be used: 'prefix_task_cols'"):
        import_peft(tmp_path)
    cols = {"prefix_task_cols": torch.ones(2, 3, 1), "prefix_task_rows": torch.ones(2, 2, 32)}
    spoil(tmp_path / TENSORS, lambda tensors: tensors.update(cols))
    with pytest.raises(SoftPromptError, match=r"adapter_model\.safetensors cannot be used: Expected size"):
        import_peft(tmp_path)
