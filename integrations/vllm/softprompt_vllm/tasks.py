"""A task as the server holds it, and what its prompt makes of a request's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from softprompt_vllm.templates import Template


@dataclass(frozen=True)
class Task:
    """A task: its name, its prompt and its template. A folder that changed gives new ones; none is ever changed.

    Attributes:
        name: the task, which is its model name.
        prompt: the prompt as rows `[length, hidden]` in the engine's dtype, or as the ids of virtual tokens that the
            model itself has.
        template: how a text becomes the model's input; None takes it as it is.
    """

    name: str
    prompt: Tensor | tuple[int, ...] = field(repr=False)
    template: Template | None = None

    @property
    def length(self) -> int:
        """The number of tokens in front of a text."""
        return len(self.prompt)


@dataclass(frozen=True)
class MixedInput:
    """A prompt as embeddings, then a text as token ids.

    Attributes:
        embeds: `[length, hidden]` in the engine's dtype: the prompt's rows, then zeros, which nobody reads.
        token_ids: `length` ids: zeros, which nobody reads, then the text's.
        is_token_ids: `length` flags: False where the embedding counts, True where the id does.
    """

    embeds: Tensor
    token_ids: list[int]
    is_token_ids: list[bool]


def mixed_input(rows: Tensor, ids: Sequence[int]) -> MixedInput:
    """The prompt `rows` (`[length, hidden]`) in front of a text's `ids`.

    Example:
        >>> import torch
        >>> made = mixed_input(torch.ones(2, 3), [7])
        >>> made.embeds.sum(1).tolist(), made.token_ids, made.is_token_ids
        ([3.0, 3.0, 0.0], [0, 0, 7], [False, False, True])
    """
    length = len(rows)
    embeds = rows.new_zeros(length + len(ids), rows.shape[1])
    embeds[:length] = rows
    return MixedInput(embeds, [0] * length + [*ids], [False] * length + [True] * len(ids))
