"""GGUF files: reading one, and writing it again with rows and tokens appended, tensor by tensor.

The `gguf` package reads and writes the format. Bytes of the base's tensors stay what they are, but where a type is
too coarse for prompts or the caller wants float32.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.files import errors_name

EMBEDDING, HEAD, HEAD_BIAS = "token_embd.weight", "output.weight", "output.bias"
TOKENS, TYPES, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
ADDS_START, START, CHAT = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", "tokenizer.chat_template"
_SIZE, _FILE_TYPE = "{architecture}.vocab_size", "general.file_type"
# Prompts keep their values in these types; a row in any other one is stored as F16.
_FINE = ("F32", "F16", "BF16", "Q8_0")
_INTEGERS = ("I8", "I16", "I32", "I64")
# llama.cpp takes the embedding for the head of these, and refuses a file that brings another one.
_TIED = ("gemma", "gemma2", "command-r", "cohere2", "openelm", "bitnet")
# Where a file does not say so, llama.cpp begins the texts of these tokenizers with a start token.
_START_MODELS = ("llama",)
_START_PRE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
_CONTROL = 3


def gguf_package() -> ModuleType:
    """The `gguf` package, which only exports to GGUF need.

    Raises:
        SoftPromptError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError as error:
        raise SoftPromptError(
            "GGUF files need the package gguf, which is not installed; pip install 'lightning-softprompt[gguf]'"
        ) from error


@dataclass(frozen=True)
class GGUFFile:
    """A base as a GGUF file.

    Attributes:
        path: the file.
        architecture: what llama.cpp calls its type of model.
        tokens: the names of its tokens; the embedding has a row for each.
        reader: the `gguf.GGUFReader`.
    """

    path: Path
    architecture: str
    tokens: list[str]
    reader: Any

    @classmethod
    def read(cls, path: Path) -> GGUFFile:
        """Read the file at `path`; tensors are read when they are used.

        Raises:
            SoftPromptError: no such file, a damaged one, a part of several files, or one without tokens or of a type
                that takes no virtual tokens.
        """
        package = gguf_package()
        if not path.is_file():
            raise SoftPromptError(f"{path} does not exist; give the GGUF file of the base")
        try:
            reader = package.GGUFReader(path)
            architecture = str(_value(reader, "general.architecture"))
            tokens, parts = _value(reader, TOKENS), _value(reader, "split.count")
            names = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise SoftPromptError(f"{path} is no GGUF file, or damaged ({error}); download it again") from error
        if parts is not None and parts > 1:
            raise SoftPromptError(f"{path} is one of {parts} parts; put them together: llama-gguf-split --merge")
        if not tokens or EMBEDDING not in names or int(names[EMBEDDING].shape[1]) != len(tokens):
            raise SoftPromptError(f"{path} has no {EMBEDDING} with a row for each of its tokens; give a language model")
        if architecture in _TIED:
            raise SoftPromptError(
                f"{path} is a {architecture}, whose head is its embedding in llama.cpp, so virtual tokens cannot be "
                "masked there; serve an export-model folder with another engine"
            )
        if "<|soft0_0|>" in tokens:
            raise SoftPromptError(f"{path} has virtual tokens already; give the file of the base")
        return cls(path, architecture, tokens, reader)

    def value(self, name: str) -> Any:
        """The value of a field; None if there is no such field."""
        return _value(self.reader, name)

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of this name."""
        return any(each.name == tensor for each in self.reader.tensors)

    def start(self) -> list[int]:
        """The ids that llama.cpp puts in front of a text."""
        adds = self.value(ADDS_START)
        if adds is None:
            pre = self.value("tokenizer.ggml.pre")
            adds = self.value("tokenizer.ggml.model") in _START_MODELS or pre in _START_PRE
        start = self.value(START)
        return [start] if adds and start is not None else []

    def kind(self, tensor: str, dtype: str | None) -> Any:
        """The type in which rows of a tensor are stored; that of the embedding where there is no such tensor."""
        quantization = gguf_package().GGMLQuantizationType
        found = {each.name: each.tensor_type for each in self.reader.tensors}
        kind = found.get(tensor, found[EMBEDDING])
        if dtype == "f32":
            return quantization.F32
        return kind if kind.name in _FINE else quantization.F16


@dataclass(frozen=True)
class Appended:
    """What a file gets beside what its base holds.

    Attributes:
        names: the names of the virtual tokens.
        rows: their rows of the embedding, float32 `[tokens, hidden]`.
        mask: their row of the head, float32 `[hidden]`.
        bias: their bias in the head; None for a head without one.
        chat_template: the chat template.
    """

    names: list[str]
    rows: Any
    mask: Any
    bias: float | None
    chat_template: str


def stored(values: Any, kind: Any) -> Any:
    """Values as a file of this type holds them: float32 of the same shape."""
    quants = gguf_package().quants
    return quants.dequantize(quants.quantize(values, kind), kind)


def write_gguf(base: GGUFFile, added: Appended, output: Path, dtype: str | None) -> None:
    """Write `base` with what is `added`; then read it, and hold it against what was to be written.

    Args:
        base: the base.
        added: the virtual tokens.
        output: the file to write; an earlier one is replaced when the new one is complete.
        dtype: "f32" stores every tensor as float32; None keeps their types.

    Raises:
        SoftPromptError: a file that cannot be written, or does not read as it was written.
    """
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        with errors_name(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            _write(base, added, temporary, dtype)
            _check(base, added, temporary, dtype)
            os.replace(temporary, output)
    finally:
        with suppress(OSError):  # there is none where it could not be made
            temporary.unlink()


def _write(base: GGUFFile, added: Appended, path: Path, dtype: str | None) -> None:
    package = gguf_package()
    writer = package.GGUFWriter(path, base.architecture)
    try:
        for name, value, kind, sub in _fields(base, added, dtype):
            writer.add_key_value(name, value, kind, sub)
        writer.data_alignment = base.reader.alignment
        sizes = {}
        for name, kind, parts in _tensors(base, added, dtype):
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            sizes[name] = sum(part.nbytes for part in parts)
            writer.add_tensor_info(name, shape, parts[0].dtype, sizes[name], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, parts in _tensors(base, added, dtype):  # again, so that memory holds one tensor at a time
            writer.write_tensor_data(parts[0] if len(parts) == 1 else numpy.concatenate(parts))
    finally:
        writer.close()


def _fields(base: GGUFFile, added: Appended, dtype: str | None) -> Iterator[tuple[str, Any, Any, Any]]:
    """Every field with its type, and the type of its elements."""
    types = gguf_package().GGUFValueType
    new = len(added.names)
    for name, field in base.reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", ADDS_START, CHAT) or not field.types:
            continue
        value: Any = field.contents()
        if name == TOKENS:
            value = [*value, *added.names]
        elif name == TYPES:
            value = [*value, *[_CONTROL] * new]
        elif name == SCORES:
            value = [*value, *[0.0] * new]
        elif name == _SIZE.format(architecture=base.architecture):
            value = len(base.tokens) + new
        elif name == _FILE_TYPE and dtype == "f32":
            value = 0
        if value != []:  # the format has no empty arrays
            yield name, value, field.types[0], field.types[-1] if field.types[0] == types.ARRAY else None
    yield ADDS_START, False, types.BOOL, None
    yield CHAT, added.chat_template, types.STRING, None


def _tensors(base: GGUFFile, added: Appended, dtype: str | None) -> Iterator[tuple[str, Any, list[Any]]]:
    """Every tensor: its name, its type, and its bytes in parts, that of the base and that of the virtual tokens."""
    quants = gguf_package().quants
    of_name = {each.name: each for each in base.reader.tensors}
    masks = numpy.repeat(added.mask[None], len(added.names), 0)
    for name, tensor in of_name.items():
        if name == HEAD_BIAS:
            kind = base.kind(name, "f32")
            bias = numpy.full(len(added.names), added.bias, numpy.float32)
            yield name, kind, [_bytes(tensor, kind), bias.view(numpy.uint8)]
        elif name in (EMBEDDING, HEAD):
            kind = base.kind(name, dtype)
            values = added.rows if name == EMBEDDING else masks
            yield name, kind, [_bytes(tensor, kind), _as_bytes(quants.quantize(values, kind))]
            if name == EMBEDDING and HEAD not in of_name:  # a head that was tied
                yield HEAD, kind, [_bytes(tensor, kind), _as_bytes(quants.quantize(masks, kind))]
        else:
            is_kept = dtype is None or tensor.tensor_type.name in _INTEGERS
            kind = tensor.tensor_type if is_kept else base.kind(name, dtype)
            yield name, kind, [_bytes(tensor, kind)]


def _bytes(tensor: Any, kind: Any) -> Any:
    """A tensor's bytes in the type `kind`; those that it has, if it is of that type."""
    if tensor.tensor_type == kind:
        return _as_bytes(tensor.data)
    quants = gguf_package().quants
    return _as_bytes(quants.quantize(quants.dequantize(tensor.data, tensor.tensor_type), kind))


def _as_bytes(values: Any) -> Any:
    return numpy.ascontiguousarray(values).view(numpy.uint8)


def _check(base: GGUFFile, added: Appended, path: Path, dtype: str | None) -> None:
    written = gguf_package().GGUFReader(path)
    found = {tensor.name: tensor for tensor in written.tensors}
    wrong = [] if _value(written, TOKENS) == [*base.tokens, *added.names] else [TOKENS]
    for name, kind, parts in _tensors(base, added, dtype):
        tensor = found.pop(name, None)
        same = tensor is not None and tensor.tensor_type == kind
        if not same or not numpy.array_equal(_as_bytes(tensor.data).reshape(-1), numpy.concatenate(parts).reshape(-1)):
            wrong.append(name)
    if wrong or found:
        raise SoftPromptError(
            f"the file does not read as it was written: {', '.join([*wrong, *found])}; check the disk, and {base.path}"
        )


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
