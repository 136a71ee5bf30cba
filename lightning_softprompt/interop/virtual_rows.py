"""Soft prompts as rows of a model's own embedding: where they stand, in which scale, and a head of the model's own.

A row of the embedding is what its module looks up; a prompt is what the module puts out. Gemma's module multiplies in
between, so rows are divided by that. Ids start at the embedding's size, which is often larger than the tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.bank import PromptBank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Engines split an embedding among devices and kernels in blocks of this many rows.
BLOCK = 64


@dataclass(frozen=True)
class VirtualRows:
    """Where the virtual tokens of all tasks stand.

    Attributes:
        known: the number of ids that the base's embedding has.
        first: the first virtual token, behind all ids of the embedding and of the tokenizer; rows between are zeros.
        size: the number of rows of the embedding, a multiple of 64; those behind the last virtual token are zeros.
        ids: the ids of each task's virtual tokens, in the order of the tasks.

    Example:
        >>> from lightning_softprompt import SoftPrompts
        >>> prompts = SoftPrompts(hidden_size=4)
        >>> prompts.add("tone", torch.zeros(2, 4))
        >>> prompts.add("spam", torch.zeros(3, 4))
        >>> VirtualRows.behind(100, prompts)
        VirtualRows(known=100, first=100, size=128, ids={'tone': [100, 101], 'spam': [102, 103, 104]})
    """

    known: int
    first: int
    size: int
    ids: dict[str, list[int]]

    @classmethod
    def behind(cls, known: int, prompts: PromptBank, named: int = 0, block: int = BLOCK) -> VirtualRows:
        """The places of `prompts` behind `known` ids of an embedding and `named` ones of its tokenizer."""
        first = max(known, named)
        ids, end = {}, first
        for task in prompts.tasks:
            ids[task] = [*range(end, end + len(prompts[task]))]
            end += len(prompts[task])
        return cls(known, first, -(-end // block) * block, ids)

    def names(self, task: str) -> list[str]:
        """The names of a task's virtual tokens. They hold the task's number, as its name may hold anything."""
        number = [*self.ids].index(task)
        return [f"<|soft{number}_{place}|>" for place in range(len(self.ids[task]))]

    def index(self, gap: float, start: list[int], **more: Any) -> str:
        """The JSON file of an export: where the virtual tokens stand, and what else is told of them.

        Args:
            gap: as `measure_gap` measures it.
            start: the ids that stand behind the virtual tokens of a task, and in front of its text.
            more: what this kind of export tells beside that.
        """
        told = {"format": 1, "first": self.first, "size": self.size, "gap": round(gap, 1), "start": start}
        return json.dumps({**told, "tasks": self.ids, **more}, indent=2, ensure_ascii=False) + "\n"


def packed_rows(prompts: PromptBank, scale: float) -> Tensor:
    """All prompts as rows of an embedding whose module multiplies by `scale`: float32 `[sum of lengths, hidden]`.

    Raises:
        SoftPromptError: a prompt that is not finite.
    """
    for task in prompts.tasks:
        if not bool(torch.isfinite(prompts[task]).all()):
            raise SoftPromptError(f"the prompt of task {task!r} holds NaN or Inf and is not exported; train it again")
    return torch.cat([prompts[task].detach().float().cpu() for task in prompts.tasks]) / scale


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model's embedding multiplies its rows by: 1, or the square root of the width for Gemma.

    Raises:
        SoftPromptError: an embedding that does something else to its rows.
    """
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight.detach()
    norms = weight[: min(len(weight), 4096)].float().norm(dim=1)
    ids = norms.topk(min(16, len(norms))).indices  # rows of zeros have no scale
    with torch.no_grad():
        rows, put_out = weight[ids].float(), embedding(ids).float()
    scale = float(put_out.norm() / rows.norm()) if put_out.shape == rows.shape else 0.0
    if not scale > 0 or float((put_out - scale * rows).norm()) > 0.01 * float(put_out.norm()):
        raise SoftPromptError(
            f"the embedding of {type(model).__name__} does more to a row than to multiply it by one number, so that "
            "prompts cannot be rows of it; serve them with MixedTaskGenerator"
        )
    return scale


def check_can_be_extended(model: PreTrainedModel) -> None:
    """Raise a `SoftPromptError` unless the model has a plain embedding and a plain linear head.

    A head that does more than one matrix product, such as one that normalises its rows, cannot be masked by a row.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if getattr(model.config, "quantization_config", None) is not None:
        raise SoftPromptError(f"{name} is quantized; export the base as it was before, and quantize the export")
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        found = type(model.get_input_embeddings()).__name__
        raise SoftPromptError(f"the embedding of {name} is a {found}; rows can be appended to an nn.Embedding alone")
    if type(head) is not nn.Linear or head.weight.shape[0] != vocabulary_size(model):
        size = list(getattr(getattr(head, "weight", None), "shape", ()))
        raise SoftPromptError(
            f"the head of {name} is {type(head).__name__} {size}; an export needs an nn.Linear with one row an id "
            f"({vocabulary_size(model)} ids). Serve these prompts with MixedTaskGenerator"
        )


def append_rows(model: PreTrainedModel, rows: VirtualRows, values: Tensor) -> None:
    """Append `values` to the model's embedding, and zeros to a head of its own, in place.

    Args:
        model: a model that `check_can_be_extended` accepts.
        rows: where the virtual tokens stand.
        values: `[sum of lengths, hidden]`, as `packed_rows` makes them; cast to the embedding's dtype.

    Raises:
        SoftPromptError: values that the embedding's dtype cannot hold.
    """
    embedding: Any = model.get_input_embeddings()
    head, old = model.get_output_embeddings(), vocabulary_size(model)
    values = values.to(embedding.weight.dtype)
    if not bool(torch.isfinite(values).all()):
        raise SoftPromptError(
            f"a prompt holds values that {embedding.weight.dtype} cannot; load the base in another dtype and save it, "
            "or train the prompt again"
        )
    own_head, own_bias = head.weight.detach(), None if head.bias is None else head.bias.detach().clone()
    model.resize_token_embeddings(rows.size, mean_resizing=False)
    with torch.no_grad():
        weight = embedding.weight  # the module stays the same when it is resized
        weight[old:] = 0
        weight[rows.first : rows.first + len(values)] = values.to(weight.device)
        like = {"dtype": own_head.dtype, "device": own_head.device}
        untied = nn.Linear(own_head.shape[1], rows.size, bias=own_bias is not None, **like)
        untied.weight.zero_()
        untied.weight[:old] = own_head[:old]
        if own_bias is not None:
            untied.bias.zero_()
            untied.bias[:old] = own_bias[:old]
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.set_output_embeddings(untied)
