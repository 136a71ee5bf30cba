"""From the logits of a step to the next token of each row, by the row's own options and its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TopPLogitsWarper


@dataclass
class Sampler:
    """How the tokens of one row are chosen. Nothing of it depends on the rows beside it.

    Attributes:
        temperature: 0 takes the likeliest token, anything above draws one.
        top_p: tokens are drawn from the likeliest ones, whose probabilities sum to this.
        seed: equal seeds draw equal tokens from equal logits.
        logprobs: how many of the likeliest tokens are told at each step, with log-probabilities; None for nothing.
        min_tokens: before so many tokens no end token is chosen.
        end_tokens: the tokens that end the row.
        written: the number of tokens so far.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: str = ""
    logprobs: int | None = None
    min_tokens: int = 0
    end_tokens: frozenset[int] = frozenset()
    written: int = 0
    numbers: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.numbers = random.Random(self.seed)


@dataclass(frozen=True)
class Choice:
    """A row's next token.

    Attributes:
        token: its id.
        logprob: its log-probability, before temperature and `top_p`; None where it was not asked for.
        likeliest: the likeliest tokens and their log-probabilities.
    """

    token: int
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """The next token of each row.

    Args:
        logits: `[rows, vocabulary]`, any floating dtype.
        samplers: of the rows.

    Returns:
        A choice for each row; None where the logits are not finite, so that nothing can be chosen.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 5.0]])
        >>> greedy, drawn = choose(logits, [Sampler(logprobs=1), Sampler(temperature=1.0, top_p=0.9, seed="7")])
        >>> greedy.token, round(greedy.logprob, 2), drawn.token in (1, 2)
        (1, -0.02, True)
    """
    logits = _without_ends(logits.float(), samplers)
    largest, tokens = logits.max(-1)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.temperature > 0]
    if drawn:
        tokens[drawn] = _drawn(logits[drawn], [samplers[row] for row in drawn])
    found, are_finite = torch.stack([tokens, largest.isfinite().to(tokens.dtype)]).tolist()
    scores = _scores(logits, tokens, samplers)
    for sampler in samplers:
        sampler.written += 1
    return [
        Choice(token, *scores.get(row, ())) if is_finite else None
        for row, (token, is_finite) in enumerate(zip(found, are_finite, strict=True))
    ]


def _without_ends(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    cells = [
        (row, token)
        for row, sampler in enumerate(samplers)
        if sampler.written < sampler.min_tokens
        for token in sampler.end_tokens
    ]
    if not cells:
        return logits
    rows, tokens = torch.tensor(cells, device=logits.device).T
    return logits.index_put((rows, tokens), logits.new_tensor(float("-inf")))


def _drawn(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw a token for each row: where the row's random number falls among the probabilities, in the order of ids.

    In that order, a difference of rounding moves the borders between tokens by as little as itself.
    """
    # Without the subtraction, a low temperature would make logits infinite.
    scores = logits - logits.max(-1, keepdim=True).values
    scores /= logits.new_tensor([[sampler.temperature] for sampler in samplers])
    for row, sampler in enumerate(samplers):
        if sampler.top_p < 1:
            scores[row] = TopPLogitsWarper(sampler.top_p)(None, scores[row : row + 1])[0]
    sums = scores.double().softmax(-1).cumsum(-1)
    places = sums.new_tensor([[sampler.numbers.random()] for sampler in samplers]) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def _scores(
    logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]
) -> dict[int, tuple[float, list[tuple[int, float]]]]:
    """The log-probability of the token, and the likeliest tokens with theirs, for the rows that want to know."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs is not None]
    if not rows:
        return {}
    counts = [min(samplers[row].logprobs or 0, logits.shape[1]) for row in rows]
    logprobs = logits[rows].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[rows][:, None])[:, 0].tolist()
    best = logprobs.topk(max(counts), dim=-1)
    listed = [list(zip(ids, values, strict=True)) for ids, values in zip(*map(Tensor.tolist, best[::-1]), strict=True)]
    return {
        row: (score, likeliest[:count])
        for row, score, likeliest, count in zip(rows, chosen, listed, counts, strict=True)
    }
