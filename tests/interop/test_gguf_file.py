"""GGUF files written again: what was there keeps its bytes, and what is added reads back."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from lightning_softprompt import SoftPromptError
from lightning_softprompt.interop import gguf_file
from lightning_softprompt.interop.gguf_file import Appended, GGUFFile, write_gguf
from tests.interop.bases import leaning_model
from tests.interop.gguf_bases import tokens, write_llama

ADDED = Appended(
    names=["<|soft0_0|>", "<|soft0_1|>"],
    rows=np.arange(64, dtype=np.float32).reshape(2, 32) / 64,
    mask=np.linspace(-90, 90, 32, dtype=np.float32),
    bias=None,
    chat_template="{{ messages }}",
)


def model(tied: bool = True):
    # K-quants are blocks of 256 values, so those are not tried here: gguf writes none.
    return leaning_model("llama", tied, vocab_size=70, intermediate_size=64)


def contents(path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_0])
@pytest.mark.parametrize("dtype", [None, "f32"])
def test_all_of_the_base_is_there_and_all_that_is_added(kind: Kind, tied: bool, dtype, tmp_path) -> None:
    base = write_llama(tmp_path / "base.gguf", model(tied), kind, tokenizer__chat_template="old")
    write_gguf(GGUFFile.read(base), ADDED, tmp_path / "new" / "tasks.gguf", dtype)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tasks.gguf"]
    fields, tensors = contents(base)
    new_fields, new_tensors = contents(tmp_path / "new" / "tasks.gguf")
    assert set(new_tensors) == {*tensors, "output.weight"}
    stored = Kind.F32 if dtype else kind if kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0) else Kind.F16
    for name, tensor in new_tensors.items():
        old = tensors.get(name, tensors["token_embd.weight"])
        values, before = (dequantize(each.data, each.tensor_type) for each in (tensor, old))
        if name in ("token_embd.weight", "output.weight"):
            assert tensor.tensor_type == stored
            added = ADDED.rows if name == "token_embd.weight" else np.stack([ADDED.mask] * 2)
            assert values.shape == (72, 32)
            assert np.abs(values[70:] - added).max() <= (0 if stored == Kind.F32 else 0.01) * np.abs(added).max()
            assert np.abs(values[:70] - before).max() <= (1e-3 if stored == Kind.F16 else 0) * np.abs(before).max()
        else:
            assert tensor.tensor_type == (Kind.F32 if dtype else old.tensor_type)
            assert np.array_equal(values, before)
    changed = {"tokenizer.ggml.tokens": [*tokens(70), *ADDED.names], "llama.vocab_size": 72}
    changed |= {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.add_bos_token": False}
    changed |= {"tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], 3, 3]}
    assert new_fields == fields | changed


def test_the_start_token_is_that_of_llama_cpp(tmp_path) -> None:
    made = leaning_model("llama", vocab_size=70)
    for start, expected in ((True, [1]), (False, []), (None, [])):
        assert GGUFFile.read(write_llama(tmp_path / "base.gguf", made, start=start)).start() == expected
    reader = GGUFFile.read(write_llama(tmp_path / "base.gguf", made, start=None))
    reader.reader.fields["tokenizer.ggml.pre"].parts[-1] = np.frombuffer(b"llama-bpe", np.uint8)
    assert reader.start() == [1]


def test_what_takes_no_virtual_tokens_is_refused(tmp_path, monkeypatch) -> None:
    made = leaning_model("llama", vocab_size=70)
    path = tmp_path / "base.gguf"
    with pytest.raises(SoftPromptError, match="does not exist"):
        GGUFFile.read(path)
    path.write_bytes(b"GGUF" + bytes(5))
    with pytest.raises(SoftPromptError, match="is no GGUF file, or damaged"):
        GGUFFile.read(path)
    write_llama(path, made)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(SoftPromptError, match="is no GGUF file, or damaged"):
        GGUFFile.read(path)
    base = GGUFFile.read(write_llama(path, made))
    write_gguf(base, ADDED, tmp_path / "tasks.gguf", None)
    with pytest.raises(SoftPromptError, match="has virtual tokens already"):
        GGUFFile.read(tmp_path / "tasks.gguf")
    monkeypatch.setattr(gguf_file, "_TIED", ("llama",))
    with pytest.raises(SoftPromptError, match="is a llama, whose head is its embedding"):
        GGUFFile.read(path)


def test_a_file_that_reads_otherwise_is_not_left(tmp_path, monkeypatch) -> None:
    base = GGUFFile.read(write_llama(tmp_path / "base.gguf", leaning_model("llama", vocab_size=70)))
    write = gguf_file._write

    def spoiled(base, added, path, dtype) -> None:
        write(base, added, path, dtype)
        with path.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\1")

    monkeypatch.setattr(gguf_file, "_write", spoiled)
    with pytest.raises(SoftPromptError, match=r"does not read as it was written: .*\.weight"):
        write_gguf(base, ADDED, tmp_path / "tasks.gguf", None)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SoftPromptError, match=r"pip install 'lightning-softprompt\[gguf\]'"):
        GGUFFile.read(tmp_path / "base.gguf")
