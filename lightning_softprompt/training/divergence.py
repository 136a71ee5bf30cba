"""How far a student's next-token distributions are from those of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_softprompt.base.padding import padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Taught:
    """What a teacher says should come next, at some positions.

    Attributes:
        log_probabilities: float32 `[positions, vocabulary]`; with `tokens`, `[positions, k + 1]`, of these tokens and,
            in the last column, of all others together.
        tokens: the likeliest tokens, the first of them in front: int64 `[positions, k]`. None where all are known.

    Example:
        >>> import torch
        >>> whole = Taught(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log())
        >>> likeliest = whole.likeliest(1)
        >>> likeliest.tokens.tolist(), likeliest.log_probabilities.exp().tolist()
        ([[0]], [[0.5, 0.5]])
        >>> student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
        >>> [round(float(taught.divergence(student)), 4) for taught in (whole, likeliest)]
        [0.1733, 0.1438]
    """

    log_probabilities: Tensor
    tokens: Tensor | None = None

    def likeliest(self, count: int) -> Taught:
        """What is kept where the `count` likeliest tokens of each position are, and the others as one."""
        tokens = self.log_probabilities.topk(count, dim=-1).indices
        return Taught(_with_rest(self.log_probabilities, tokens), tokens)

    def divergence(self, student: Tensor) -> Tensor:
        """The Kullback-Leibler divergence of the student from the teacher, KL(teacher ‖ student), at each position.

        It is large where the student finds unlikely what the teacher finds likely. Over the likeliest tokens, with the
        others as one, it is never larger than over all.

        Args:
            student: log-probabilities, float32 `[positions, vocabulary]`.

        Returns:
            In nats: float32 `[positions]`.
        """
        theirs = student if self.tokens is None else _with_rest(student, self.tokens)
        return (self.log_probabilities.exp() * (self.log_probabilities - theirs)).sum(-1)

    def first(self) -> Tensor:
        """The likeliest token of each position: int64 `[positions]`."""
        return self.log_probabilities.argmax(-1) if self.tokens is None else self.tokens[:, 0]


def _with_rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Those of `tokens`, and of all others together."""
    rest = log_probabilities.scatter(1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, tokens), rest], 1)


def answer_log_probabilities(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tasks: Sequence[str | None],
    pad: int,
) -> Tensor:
    """The log-probabilities of every token at the positions of the answers, whose tokens are given.

    Args:
        model: a causal LM with prompts attached.
        texts: the token ids of each row's text, at least one.
        answers: the token ids of each row's answer, at least one.
        tasks: the task of each row; None means no prompt.
        pad: the id of pads.

    Returns:
        float32 `[positions, vocabulary]`: the positions of the first row's answer, then of the second's, and so on. The
        first position of an answer is that of the last token of its text, which predicts the answer's first token.
    """
    rows = [[*text, *answer] for text, answer in zip(texts, answers, strict=True)]
    lengths = torch.tensor([len(answer) for answer in answers], device=model.device)
    longest = int(lengths.max())  # answers end in the last column, so only the logits of the last columns are computed
    inputs = padded_inputs(rows, pad, model.device)
    logits = model(**inputs, tasks=list(tasks), logits_to_keep=longest + 1).logits[:, :-1]
    is_answer = torch.arange(longest, device=model.device) >= longest - lengths[:, None]
    return logits[is_answer].float().log_softmax(-1)
