"""Inspecting prompts: the norms of their tokens, how alike they are, and the vocabulary's tokens nearest to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts import statistics
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

CAVEAT = (
    "The nearest tokens explain little: a prompt may lie next to words that have nothing to do with what it does "
    "(arXiv 2112.08348)."
)
_CHUNK = 8192


@dataclass(frozen=True)
class Near:
    """A token of the vocabulary that lies near a virtual token, and its cosine with it."""

    token: str
    cosine: float


@torch.no_grad()
def nearest_tokens(prompts: SoftPrompts, model: PreTrainedModel, tokenizer: Any, count: int) -> dict[str, list[Near]]:
    """The vocabulary's tokens that are nearest to each virtual token by cosine. `CAVEAT` says how little they explain.

    Returns:
        For each task one list: `count` tokens for the first virtual token, the nearest first, then `count` for the
        second, and so on.

    Raises:
        SoftPromptError: prompts of another base model, or a `count` that is not between 1 and the vocabulary's size.
    """
    if prompts.base is not None:
        prompts.base.check(model)
    embedding, vocabulary = model.get_input_embeddings(), vocabulary_size(model)
    if not 1 <= count <= vocabulary:
        raise SoftPromptError(f"the number of nearest tokens must lie in [1, {vocabulary}], got {count}")
    device = next(embedding.parameters()).device
    order = prompts.distinct(range(len(prompts)))
    packed, offsets = prompts.packed(order)
    queries = functional.normalize(packed.to(device).float(), dim=1)
    best, ids = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64, device=device)
    for chunk in torch.arange(vocabulary, device=device).split(_CHUNK):
        cosines = queries @ functional.normalize(embedding(chunk[None])[0].float(), dim=1).T
        best, ids = torch.cat([best, cosines], 1), torch.cat([ids, chunk.expand(len(queries), -1)], 1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    words, bounds = tokenizer.batch_decode(ids.flatten()[:, None].tolist()), offsets.tolist()
    near = [Near(word, float(cosine)) for word, cosine in zip(words, best.flatten().tolist(), strict=True)]
    by_index = {index: near[count * bounds[at] : count * bounds[at + 1]] for at, index in enumerate(order)}
    return {task: by_index[index] for index, task in enumerate(prompts)}


def draw(prompts: SoftPrompts) -> Figure:
    """A figure with the norms of each task's virtual tokens and a heat map of how alike the tasks are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    norms, likeness = figure.subplots(1, 2)
    values = {task: prompts[task].detach().float().cpu() for task in prompts}
    for task, value in values.items():
        norms.plot(torch.linalg.vector_norm(value, dim=1).tolist(), marker="o", markersize=3, label=task)
    norms.set(title="norms of the virtual tokens", xlabel="virtual token", yscale="log")
    norms.xaxis.get_major_locator().set_params(integer=True)
    if len(values) <= 20:
        norms.legend(fontsize="small")
    draw_likeness(likeness, figure, values)
    return figure


def draw_likeness(axis: Any, figure: Figure, prompts: Mapping[str, Tensor]) -> None:
    """Draw a heat map of how alike the tasks are or, if there is only one task, how alike its virtual tokens are."""
    values = [prompt.detach().float().cpu() for prompt in prompts.values()]
    if not values:  # a history was loaded from a checkpoint, and no run has started since
        axis.set_axis_off()
        return
    if len(values) > 1:
        names, likeness = list(prompts), statistics.task_similarities(values)
        axis.set_title("cosine of the tasks' mean tokens")
    else:
        unit = functional.normalize(values[0], dim=1)
        names, likeness = [str(token) for token in range(len(unit))], unit @ unit.T
        axis.set_title("cosine of the prompt's tokens")
    image = axis.imshow(likeness.numpy(), vmin=-1, vmax=1, cmap="coolwarm")
    figure.colorbar(image, ax=axis)
    if len(names) <= 30:
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
        axis.set_yticks(range(len(names)), names, fontsize="small")
