"""Rows that are answered in whole batches, one after the other: for models that keep more than keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.padding import padded_inputs
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.serving.rows import TextRow
from lightning_softprompt.serving.sampling import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WholeBatch:
    """Rows that are answered to the end before others may begin, in one call of `generate`.

    Each row has options of its own all the same: a logits processor chooses its tokens, and `generate` takes them.

    Args:
        model: a causal LM with prompts attached.
        pad: the id of pads.

    Attributes:
        rows: those under way; none between two calls of `join`.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.rows: list[TextRow] = []
        self._model: Any = model
        self._pad = pad
        # Rows of such a model are continued one by one, and a processor would not know which one it is given.
        self._one_by_one = ModelTraits.of(model).padding_side == "right"

    def passes(self, rows: Sequence[TextRow]) -> list[list[TextRow]]:
        """All rows at once: each pass answers to the end, so that two take the steps of both."""
        return [list(rows)] if rows else []

    def join(self, rows: Sequence[TextRow]) -> None:
        """Answer rows to the end."""
        for batch in [[row] for row in rows] if self._one_by_one else [list(rows)]:
            self.rows = batch
            try:
                self._generate(batch)
            finally:
                self.rows = []

    def step(self) -> None:
        """There is nothing left to do."""

    def clear(self) -> None:
        """Nothing is kept."""

    def _generate(self, rows: list[TextRow]) -> None:
        config = GenerationConfig(
            max_new_tokens=max(row.max_tokens for row in rows),
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=vocabulary_size(self._model),  # no token: which ones end a row is the row's own matter
        )
        self._model.generate(
            **padded_inputs([row.request.ids for row in rows], self._pad, self._model.device),
            tasks=[row.request.task for row in rows],
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choosing(rows, self._pad)]),
            stopping_criteria=StoppingCriteriaList([_Done(rows)]),
        )


class _Choosing(LogitsProcessor):
    """Gives each row its next token, and leaves `generate` no other to take."""

    def __init__(self, rows: Sequence[TextRow], pad: int) -> None:
        self._rows = rows
        self._pad = pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = []
        for row, choice in zip(self._rows, choose(scores, [row.sampler for row in self._rows]), strict=True):
            if not row.is_done:
                row.accept(choice)
            tokens.append(self._pad if choice is None else choice.token)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _Done(StoppingCriteria):
    """Says of each row whether it has ended, or nobody waits for it any more."""

    def __init__(self, rows: Sequence[TextRow]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([row.is_done for row in self._rows], device=input_ids.device)
