"""Base models and tokenizers from a folder, and what is said where there are none."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

from lightning_softprompt import SoftPromptError
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from tests import tiny


def test_what_was_saved_is_loaded_with_the_options_of_transformers(tiny_base) -> None:
    saved = tiny.tiny_model("llama").state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        found = load_causal_lm(str(tiny_base), dtype=dtype).state_dict()
        assert found.keys() == saved.keys()
        for name, value in saved.items():
            assert found[name].dtype == dtype
            torch.testing.assert_close(found[name], value.to(dtype))
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer("good bad")["input_ids"] == [4, 5]  # the first words, behind four special tokens


@pytest.mark.parametrize("load, what", [(load_causal_lm, "causal LM"), (load_tokenizer, "tokenizer")])
def test_what_is_not_there_is_named(load, what: str, tmp_path) -> None:
    missing = tmp_path / "gone"
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (missing, empty):
        with pytest.raises(SoftPromptError, match=f"no {what} could be loaded from '{path}'; give the id of") as caught:
            load(path)
        assert isinstance(caught.value.__cause__, OSError | ValueError)
        assert str(caught.value).endswith(" (there is no folder of that name)") == (path == missing)


@pytest.mark.parametrize("load, what", [(load_causal_lm, "causal LM"), (load_tokenizer, "tokenizer")])
def test_code_of_a_base_is_neither_run_nor_asked_about(
    load, what: str, tiny_base, tmp_path, monkeypatch, capsys
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.LM", "AutoTokenizer": ["own.Words", None]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": classes, "model_type": "own", "tokenizer_class": "Words"}
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    with pytest.raises(
        SoftPromptError, match=f"the {what} in '.*base' needs code that comes with it, which is not run"
    ):
        load(folder)
    assert not (tmp_path / "ran").exists() and "[y/N]" not in capsys.readouterr().out


def test_a_damaged_model_is_named(tiny_base, tmp_path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SoftPromptError, match="no causal LM could be loaded from"):
        load_causal_lm(folder)
