"""Inspecting prompts: the norms of their tokens, how alike they are, and the vocabulary's tokens nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.figures import looks, style
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
_MOST_NAMES, _MOST_NUMBERS = 30, 12


@dataclass(frozen=True)
class Near:
    """A token of the vocabulary that lies near a virtual token, and its cosine with it."""

    token: str
    cosine: float


@torch.no_grad()
def nearest_tokens(
    prompts: SoftPrompts, model: PreTrainedModel, tokenizer: Any, count: int
) -> dict[str, list[list[Near]]]:
    """The vocabulary's tokens that are nearest to each virtual token by cosine. `CAVEAT` says how little they explain.

    Returns:
        For each task and each of its virtual tokens, `count` tokens, the nearest first.

    Raises:
        SoftPromptError: prompts of another base model, or a `count` that is not between 1 and the vocabulary's size.
    """
    if prompts.base is not None:
        prompts.base.check(model)
    embedding, vocabulary = model.get_input_embeddings(), vocabulary_size(model)
    if not 1 <= count <= vocabulary:
        raise SoftPromptError(f"the number of nearest tokens must lie in [1, {vocabulary}], got {count}")
    device = next(embedding.parameters()).device
    order = prompts.distinct(prompts)
    packed, offsets = prompts.packed(order)
    queries = functional.normalize(packed.to(device).float(), dim=1)
    best, ids = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64, device=device)
    for chunk in torch.arange(vocabulary, device=device).split(_CHUNK):
        cosines = queries @ functional.normalize(embedding(chunk[None])[0].float(), dim=1).T
        best, ids = torch.cat([best, cosines], 1), torch.cat([ids, chunk.expand(len(queries), -1)], 1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    words = iter(tokenizer.batch_decode(ids.flatten()[:, None].tolist()))
    near = [[Near(next(words), cosine) for cosine in of_token] for of_token in best.tolist()]
    by_task = {task: near[begin:end] for task, (begin, end) in zip(order, pairwise(offsets.tolist()), strict=True)}
    return {task: by_task[task] for task in prompts}


def draw(prompts: SoftPrompts) -> Figure:
    """A figure with the norms of each task's virtual tokens and a heat map of how alike the tasks are."""
    from matplotlib.figure import Figure

    values = {task: prompts[task].detach().float().cpu() for task in prompts}
    with style():
        figure = Figure(figsize=(12, 5))
        norms, likeness = figure.subplots(1, 2)
        for number, (task, value) in enumerate(values.items()):
            # Beside one another, and without a line from one to the next: near tokens are not nearer in meaning.
            places = number + 0.35 * torch.linspace(-1, 1, len(value) + 2)[1:-1]
            marks = {"marker": "o", "markersize": 4, "alpha": 0.7, "color": looks(number)["color"], "linestyle": "none"}
            norms.plot(places.tolist(), torch.linalg.vector_norm(value, dim=1).tolist(), label=task, **marks)
        norms.set(title="virtual tokens, in their order", ylabel="L2 norm", ylim=(0, None))
        _name(norms.xaxis, list(values), rotation=45)
        norms.grid(False, axis="x")
        draw_likeness(likeness, figure, values)
    return figure


def draw_likeness(axis: Any, figure: Figure, prompts: Mapping[str, Tensor]) -> None:
    """Draw a heat map of how alike the tasks are or, if there is only one task, how alike its virtual tokens are."""
    values = [prompt.detach().float().cpu() for prompt in prompts.values()]
    if len(values) > 1:
        names, likeness = list(prompts), statistics.task_similarities(values)
        axis.set_title("how alike the tasks are")
    else:
        unit = functional.normalize(values[0], dim=1)
        names, likeness = [str(token) for token in range(len(unit))], unit @ unit.T
        axis.set_title(f"how alike the virtual tokens of {next(iter(prompts))} are")
    image = axis.imshow(likeness.numpy(), vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axis, label="cosine of the mean tokens" if len(values) > 1 else "cosine")
    axis.grid(False)
    _name(axis.xaxis, names, rotation=45)
    _name(axis.yaxis, names)
    if len(names) <= _MOST_NUMBERS:
        for row, cosines in enumerate(likeness.tolist()):
            for column, cosine in enumerate(cosines):
                color = "white" if abs(cosine) > 0.6 else "black"  # on the dark ends of the colours, and between them
                axis.text(column, row, f"{cosine:.2f}", ha="center", va="center", color=color, fontsize="small")


def _name(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Name the places on an axis, as far as there is room for names."""
    if len(names) > _MOST_NAMES:
        axis.set_ticks([])
    else:
        axis.set_ticks(range(len(names)), names, rotation=rotation, ha="right", fontsize="small")
