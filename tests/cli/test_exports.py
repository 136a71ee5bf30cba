"""The commands that write a base and its prompts as one model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_softprompt import SoftPrompts, cli
from tests import tiny
from tests.cli.command_line import refused, said
from tests.interop.bases import leaning_model, save_base, some_prompts
from tests.interop.gguf_bases import write_llama


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = leaning_model("llama")
    save_base(tmp_path / "base", model)
    write_llama(tmp_path / "base.gguf", model)
    prompts = some_prompts(model)
    prompts.save_pretrained("prompts")
    return prompts


def test_export_model_takes_what_other_commands_take_and_says_the_gap(given, tmp_path, capsys) -> None:
    values = {f"model.soft_prompts.{name}": value for name, value in given.state_dict().items()}
    torch.save({"state_dict": values, "soft_prompts": given.description().content()}, "run.ckpt")
    for number, prompts in enumerate(("prompts", "run.ckpt")):
        found = said(capsys, "export-model", "--base", "base", "--prompts", prompts, "--output", f"served{number}")
        index = json.loads((tmp_path / f"served{number}" / "virtual_tokens.json").read_text())
        assert found == {"output": f"served{number}", "gap": index["gap"]} and found["gap"] > 30
    assert AutoModelForCausalLM.from_pretrained("served0").config.vocab_size == 128
    cli.main(["export-model", "--base=base", "--prompts=prompts", "--output=served0"])
    assert "served0 is written; on held-out texts the best token stands" in capsys.readouterr().out


def test_export_gguf_says_the_gap(given, tmp_path, capsys) -> None:
    for dtype in ([], ["--dtype", "f32"]):
        options = ["--gguf", "base.gguf", "--prompts", "prompts", "--output", "tasks.gguf", *dtype]
        found = said(capsys, "export-gguf", *options)
        index = json.loads((tmp_path / "tasks.gguf.json").read_text())
        assert found == {"output": "tasks.gguf", "gap": index["gap"]}
    with pytest.raises(SystemExit) as end:
        cli.main(["export-gguf", "--gguf=base.gguf", "--prompts=prompts", "--output=tasks.gguf", "--dtype=f16"])
    assert end.value.code == 2


def test_what_cannot_be_exported_is_one_line(given, tmp_path, capsys) -> None:
    save_base(tmp_path / "everywhere", tiny.tiny_model("llama"))
    SoftPrompts.for_model(tiny.tiny_model("llama"), {"one": 2}).save_pretrained("others")
    common = ["--prompts", "others", "--output", "served"]
    assert "no direction in common" in refused(capsys, "export-model", "--base", "everywhere", *common)
    assert "made for another base model" in refused(capsys, "export-model", "--base", "base", *common)
    assert "gone.gguf does not exist" in refused(capsys, "export-gguf", "--gguf", "gone.gguf", *common)
    assert not (tmp_path / "served").exists()
