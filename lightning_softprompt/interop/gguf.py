"""A base's GGUF file and its soft prompts as one GGUF file, for llama.cpp and what is built on it.

It is the export of `virtual_tokens` in another format: rows behind the embedding, a head of its own that is masked,
tokens, and a chat template that takes `task=`. llama.cpp has tokenizers of its own and no aliases.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.base.support import check_model
from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.interop.gguf_file import CHAT, HEAD, HEAD_BIAS, Appended, GGUFFile, stored, write_gguf
from lightning_softprompt.interop.masked_head import mask_head, measure_gap
from lightning_softprompt.interop.task_chat import TaskText, chat_template
from lightning_softprompt.interop.virtual_rows import (
    VirtualRows,
    append_rows,
    check_can_be_extended,
    embedding_scale,
    packed_rows,
)
from lightning_softprompt.prompts.files import errors_name, write_atomically
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["f32"]
# Quantizing an embedding to four bits turns it by less than this; another model's is at a right angle.
_SMALLEST_COSINE = 0.9


def export_gguf(
    gguf: str | Path,
    prompts: SoftPrompts | str | Path,
    output: str | Path,
    dtype: Dtype | None = None,
    base: str | Path | None = None,
) -> float:
    """Write a base's GGUF file with virtual tokens appended. A file beside it, `OUTPUT.json`, has their ids.

    Tensors keep their types and bytes. An embedding or head that is quantized below Q8_0 is stored as F16, as its type
    is too coarse for prompts. Texts get no start token by themselves: it stands behind the virtual tokens.

    Args:
        gguf: the GGUF file of the base, of any quantization.
        prompts: the prompts, or where they are saved: a folder, a checkpoint or a hub id.
        output: the GGUF file to write. An earlier one is replaced when the new one is complete.
        dtype: "f32" stores all of the model as float32, for tokens equal to those of the attached prompts; None keeps
            the types of the base.
        base: hub id or path of the model that the file was made from. None takes the weights of the file, if
            transformers reads its type of model.

    Returns:
        The gap, as `export_model` measures it.

    Raises:
        SoftPromptError: the `gguf` package is not installed, a file that cannot be read or takes no virtual tokens,
            prompts that cannot be loaded, are of another base or not finite, a gap below 30, or a file that cannot be
            written or is the base itself.

    Example:
        >>> export_gguf("gone.gguf", SoftPrompts(4), "tasks.gguf")
        Traceback (most recent call last):
        lightning_softprompt.errors.SoftPromptError: gone.gguf does not exist; give the GGUF file of the base
    """
    if dtype is not None:
        check_choice("dtype", dtype, Dtype)
    if not isinstance(prompts, SoftPrompts):
        prompts = SoftPrompts.from_pretrained(prompts)
    file, output = GGUFFile.read(Path(gguf)), Path(output)
    _check_output(output, file.path)
    model, tokenizer = _load(file, base)
    check_model(model)
    _check_fits(prompts, model, file)
    check_can_be_extended(model)
    packed = packed_rows(prompts, embedding_scale(model))
    measured = VirtualRows.behind(vocabulary_size(model), prompts)
    append_rows(model, measured, packed)
    head = model.get_output_embeddings()
    if (head.bias is not None) != file.has(HEAD_BIAS):
        raise SoftPromptError(f"of {file.path} and its base one has a bias in the head; give the base it was made from")
    mask_head(model, tokenizer, measured)
    mask = head.weight[measured.first].detach().float().cpu().numpy()
    with torch.no_grad():  # what is measured is what is written
        head.weight[measured.first :] = torch.from_numpy(stored(mask[None], file.kind(HEAD, dtype))).to(head.weight)
    gap = measure_gap(model, tokenizer, measured)
    rows = VirtualRows.behind(len(file.tokens), prompts, block=1)
    names = [name for task in prompts.tasks for name in rows.names(task)]
    bias = None if head.bias is None else float(head.bias[measured.first])
    template = _chat_template(file, rows, prompts)
    write_gguf(file, Appended(names, packed.numpy(), mask, bias, template), output, dtype)
    prefixes = {task: _prefix(file, rows, task) for task in rows.ids}
    index = rows.index(gap, file.start(), prefixes=prefixes)
    with errors_name(output.parent):
        write_atomically(output.with_name(f"{output.name}.json"), index.encode())
    return gap


def _check_output(output: Path, base: Path) -> None:
    if output.is_dir():
        raise SoftPromptError(f"{str(output)!r} is a folder; give the name of a file in it")
    if output.exists() and output.samefile(base):
        raise SoftPromptError(f"{output} is the GGUF file of the base, which would be lost; give another output")


def _load(file: GGUFFile, base: str | Path | None) -> tuple[PreTrainedModel, Any]:
    """The model, to measure its states, and its tokenizer."""
    if base is not None:
        return load_causal_lm(base, dtype="auto"), load_tokenizer(base)
    where, options = file.path.parent, {"gguf_file": file.path.name}
    try:
        tokenizer = load_tokenizer(where, **options)
        model = load_causal_lm(where, dtype=torch.float32, **options)
    except Exception as error:  # transformers reads some types of models, and raises anything for the others
        raise SoftPromptError(
            f"transformers cannot read the {file.architecture} of {file.path} ({' '.join(str(error).split())}); give "
            "base, the id or folder of the model that it was made from"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # its weights are float32 by now
    return model, tokenizer


def _check_fits(prompts: SoftPrompts, model: PreTrainedModel, file: GGUFFile) -> None:
    """Raise a `SoftPromptError` unless the prompts are of this base, whose embedding quantization may have changed."""
    if not len(prompts):
        raise SoftPromptError("there is no task in these prompts; add one first")
    base = prompts.base
    ids = None if base is None or max(base.ids, default=0) >= vocabulary_size(model) else base.ids
    found = BaseModel.of(model, ids)
    here, there = (torch.tensor(each.fingerprint, device="cpu") for each in (found, base or found))
    cosine = float(torch.cosine_similarity(here, there, dim=0)) if here.shape == there.shape else 0.0
    if found.hidden_size != prompts.hidden_size or cosine < _SMALLEST_COSINE:
        raise SoftPromptError(
            f"these prompts were made for another base model ({(base and base.name) or 'without a name'}, width "
            f"{prompts.hidden_size}) than {file.path} (width {found.hidden_size}): the embeddings differ. Give the "
            "GGUF file of that model"
        )


def _chat_template(file: GGUFFile, rows: VirtualRows, prompts: SoftPrompts) -> str:
    tasks = {
        task: TaskText(_prefix(file, rows, task), "".join(rows.names(task)), prompts.templates.get(task))
        for task in prompts.tasks
    }
    return chat_template(file.value(CHAT), tasks)


def _prefix(file: GGUFFile, rows: VirtualRows, task: str) -> str:
    return "".join([*rows.names(task), *(file.tokens[id] for id in file.start())])
