"""Numbers that tell a healthy prompt from one that has collapsed. Plain functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_softprompt.base.embedding import look_up


def token_similarity(prompt: Tensor) -> Tensor:
    """Mean cosine over all pairs of a prompt's tokens: 1 where all point the same way.

    Args:
        prompt: float `[length, hidden]`.

    Returns:
        A scalar, 0 for a prompt of one token.

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
    """Cosines of the mean tokens of every two tasks, `[tasks, tasks]`; prompts are `[length, hidden]`."""
    means = functional.normalize(torch.stack([prompt.mean(0) for prompt in prompts]), dim=1)
    return means @ means.T


def mean_of_pairs(similarities: Tensor) -> Tensor:
    """Mean of a symmetric matrix `[tasks, tasks]` beside its diagonal; 0 for one task."""
    tasks = len(similarities)
    return (similarities.sum() - similarities.trace()) / max(tasks * (tasks - 1), 1)


def effective_rank(prompt: Tensor) -> Tensor:
    """How many directions a prompt's tokens span: the exponential of the entropy of its singular values.

    Between 1 and the prompt's length. Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality".

    Args:
        prompt: float `[length, hidden]`.

    Returns:
        A scalar; not a number where an entry is not finite.

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
        embedding: the module, as some scale what they look up.
        vocabulary: number of its ids.
        device: where it is.
    """
    parts = torch.arange(vocabulary, device=device).split(8192)
    norms = (
        torch.cat([torch.linalg.vector_norm(look_up(embedding, ids[None])[0].float(), dim=-1) for ids in parts])
        .sort()
        .values
    )
    places = torch.tensor([0.01, 0.5, 0.99], device=norms.device) * (len(norms) - 1)
    return norms[places.round().long()]


def vocabulary_distance(prompt: Tensor, band: Tensor) -> Tensor:
    """How far a prompt's mean token norm lies outside the vocabulary's band, in medians of the vocabulary.

    Args:
        prompt: float `[length, hidden]`.
        band: of `norm_band`.

    Returns:
        A scalar: 0 inside, negative below, positive above.

    Example:
        >>> band = torch.tensor([1.0, 2.0, 3.0])
        >>> vocabulary_distance(torch.tensor([[7.0, 0.0]]), band), vocabulary_distance(torch.tensor([[2.5, 0.0]]), band)
        (tensor(2.), tensor(0.))
    """
    low, median, high = band
    norm = torch.linalg.vector_norm(prompt, dim=1).mean()
    return ((norm - high).clamp(min=0) - (low - norm).clamp(min=0)) / median
