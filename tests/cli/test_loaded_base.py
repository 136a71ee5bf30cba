"""The base model of a command, on the device and in the dtype of its options."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts
from lightning_softprompt.cli.loaded_base import loaded_base
from tests import tiny
from tests.cli.command_line import refused, said


def test_a_base_has_the_dtype_and_the_device_that_were_asked_for(tiny_base) -> None:
    model, tokenizer = loaded_base(str(tiny_base), "meta", "bfloat16")
    assert model.dtype == torch.bfloat16 and model.device.type == "meta" and tokenizer("it").input_ids
    model, _ = loaded_base(str(tiny_base), "auto", "auto")
    assert model.dtype == torch.float32 and model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "device, dtype, message",
    [
        ("nowhere", "auto", "the model cannot be put on 'nowhere'"),
        ("cpu", "int64", "'int64' is no dtype of weights"),
        ("cpu", "nothing", "'nothing' is no dtype of weights"),
    ],
)
def test_what_there_is_not_is_refused(tiny_base, device: str, dtype: str, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        loaded_base(str(tiny_base), device, dtype)


def test_answers_are_computed_where_and_as_the_options_say(tiny_base, tmp_path, capsys) -> None:
    prompts = SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4})
    prompts.save_pretrained(tmp_path / "prompts")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "it is"}) + "\n")
    files = {"prompts": "prompts", "input": "rows.jsonl", "output": "out.jsonl"}
    arguments = ["generate", f"--base={tiny_base}", *(f"--{name}={tmp_path / file}" for name, file in files.items())]
    assert "the model cannot be put on 'nowhere'" in refused(capsys, *arguments, "--device=nowhere")
    said(capsys, *arguments, "--dtype=bfloat16", "--device=cpu")
