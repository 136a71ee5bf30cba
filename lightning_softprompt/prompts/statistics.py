"""Numbers that distinguish a healthy prompt from one that has collapsed. Most are plain functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_softprompt.base.embedding import look_up

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts


def token_similarity(prompt: Tensor) -> Tensor:
    """The mean cosine over all pairs of a prompt's tokens: 1 if all of them point in the same direction.

    Args:
        prompt: float `[length, hidden]`.

    Returns:
        A scalar; 0 for a prompt of one token.

    Example:
        >>> token_similarity(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor(1.)
        >>> token_similarity(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor(0.)
    """
    length = len(prompt)
    together = functional.normalize(prompt, dim=1).sum(0).square().sum()
    return (together - length) / max(length * (length - 1), 1) if length > 1 else together.new_zeros(())


def task_similarities(prompts: list[Tensor]) -> Tensor:
    """The cosines between the mean tokens of every two tasks, `[tasks, tasks]`; each prompt is `[length, hidden]`."""
    means = functional.normalize(torch.stack([prompt.mean(0) for prompt in prompts]), dim=1)
    return means @ means.T


def mean_of_pairs(similarities: Tensor) -> Tensor:
    """The mean of a symmetric matrix `[tasks, tasks]` without its diagonal; 0 for one task."""
    tasks = len(similarities)
    return (similarities.sum() - similarities.trace()) / max(tasks * (tasks - 1), 1)


def effective_rank(prompt: Tensor) -> Tensor:
    """How many directions a prompt's tokens span: the exponential of the entropy of its singular values.

    It lies between 1 and the prompt's length (Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality").

    Args:
        prompt: float `[length, hidden]`.

    Returns:
        A scalar; NaN if an entry of the prompt is not finite.

    Example:
        >>> effective_rank(torch.eye(4)).round()
        tensor(4.)
        >>> effective_rank(torch.ones(4, 4)).round()
        tensor(1.)
    """
    is_finite = prompt.isfinite().all()
    values = torch.linalg.svdvals(torch.where(is_finite, prompt.float(), 0))
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(is_finite, torch.special.entr(shares).sum().exp(), torch.nan)


@torch.no_grad()
def norm_band(embedding: nn.Module, vocabulary: int, device: torch.device) -> Tensor:
    """The 1st, 50th and 99th percentile of the norms of a vocabulary's embeddings: float32 `[3]`.

    Args:
        embedding: the embedding module. It is called because some modules scale the values they look up.
        vocabulary: number of its ids.
        device: the device of its weights.
    """
    parts = torch.arange(vocabulary, device=device).split(8192)
    norms = (
        torch.cat([torch.linalg.vector_norm(look_up(embedding, ids[None])[0].float(), dim=-1) for ids in parts])
        .sort()
        .values
    )
    positions = torch.tensor([0.01, 0.5, 0.99], device=norms.device) * (len(norms) - 1)
    return norms[positions.round().long()]


def vocabulary_distance(prompt: Tensor, band: Tensor) -> Tensor:
    """How far a prompt's mean token norm lies outside the band of the vocabulary's norms, in units of their median.

    It compares norms alone, and says nothing of how near a token is to a word.

    Args:
        prompt: float `[length, hidden]`.
        band: the result of `norm_band`, `[3]`.

    Returns:
        A scalar: 0 inside the band, negative below it, positive above it.

    Example:
        >>> band = torch.tensor([1.0, 2.0, 3.0])
        >>> vocabulary_distance(torch.tensor([[7.0, 0.0]]), band), vocabulary_distance(torch.tensor([[2.5, 0.0]]), band)
        (tensor(2.), tensor(0.))
    """
    low, median, high = band
    norm = torch.linalg.vector_norm(prompt, dim=1).mean()
    return ((norm - high).clamp(min=0) - (low - norm).clamp(min=0)) / median


@dataclass(frozen=True)
class PromptStatistics:
    """The statistics of one task's prompt.

    Attributes:
        task: the task's name.
        length: number of virtual tokens.
        start: how the prompt started, in words.
        frozen: whether the prompt is excluded from training.
        token_norm: mean norm of the prompt's tokens.
        token_similarity: mean cosine of the prompt's tokens; 1 means that they have become one.
        effective_rank: how many directions the tokens span, from 1 to `length`.
        closest_task: the other task whose mean token is most similar; None if there is no other task.
        closest_cosine: the cosine between the mean tokens of the two tasks; None if there is no other task.
    """

    task: str
    length: int
    start: str
    frozen: bool
    token_norm: float
    token_similarity: float
    effective_rank: float
    closest_task: str | None
    closest_cosine: float | None


def prompt_statistics(prompts: SoftPrompts) -> list[PromptStatistics]:
    """The statistics of each task's prompt, in the order of the tasks.

    Example:
        >>> from lightning_softprompt import SoftPrompts
        >>> prompts = SoftPrompts(hidden_size=2)
        >>> prompts.add("a", torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> prompts.add("b", torch.tensor([[3.0, 4.0]]))
        >>> [(each.task, each.token_norm, each.closest_task) for each in prompt_statistics(prompts)]
        [('a', 1.0, 'b'), ('b', 5.0, 'a')]
    """
    values = {task: prompts[task].detach().float().cpu() for task in sorted(prompts)}
    names = list(values)
    likeness = task_similarities(list(values.values())).fill_diagonal_(-torch.inf) if values else None
    found = []
    for task in prompts:
        value, closest, cosine = values[task], None, None
        if likeness is not None and len(values) > 1:
            row = likeness[names.index(task)]
            closest, cosine = names[int(row.argmax())], float(row.max())
        found.append(
            PromptStatistics(
                task,
                len(value),
                prompts.starts[task],
                not prompts[task].requires_grad,
                float(torch.linalg.vector_norm(value, dim=1).mean()),
                float(token_similarity(value)),
                float(effective_rank(value)),
                closest,
                cosine,
            )
        )
    return found
