"""What `prompt_concat` has to give, by its definition, one column at a time; and cases to ask it about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

MASK_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, None]


@dataclass
class Case:
    """Arguments of one call, with the text as a table and its ids, or ready (`input_ids` None)."""

    embeddings: Tensor
    input_ids: Tensor | None
    prompts: Tensor
    offsets: Tensor
    task_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    padding_side: str
    max_prompt_length: int
    mask_form: str

    def to(self, device: str) -> Case:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def text(self) -> Tensor:
        """`[batch, length, hidden]`."""
        return self.embeddings if self.input_ids is None else self.embeddings[self.input_ids]

    @property
    def text_length(self) -> int:
        """Columns of the text."""
        return (self.embeddings if self.input_ids is None else self.input_ids).shape[1]

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the call has to return, from a loop over rows and columns."""
        text, offsets = self.text, self.offsets.tolist()
        batch, length, hidden = text.shape
        width = self.max_prompt_length + length
        given = torch.ones(batch, length, dtype=torch.int64) if self.attention_mask is None else self.attention_mask
        embeds = torch.zeros(batch, width, hidden, dtype=text.dtype)
        mask = torch.zeros(batch, width, dtype=given.dtype)
        positions = torch.zeros(batch, width, dtype=torch.int64)
        labels = torch.full((batch, width), -100)
        for b in range(batch):
            task = int(self.task_ids[b])
            rows = self.prompts[offsets[task] : offsets[task + 1]] if task >= 0 else self.prompts[:0]
            first = next((j for j in range(length) if given[b, j]), length)
            start = self.max_prompt_length + first - len(rows) if self.padding_side == "left" else 0
            seen = 0
            for column in range(width):
                place = column - start
                source = first + place - len(rows)
                if 0 <= place < len(rows):
                    embeds[b, column] = rows[place].to(text.dtype)
                    mask[b, column] = 1
                elif place >= len(rows) and source < length:
                    embeds[b, column] = text[b, source]
                    mask[b, column] = given[b, source]
                    is_predicted = len(rows) > 0 or source > first
                    if self.labels is not None and given[b, source] and is_predicted:
                        labels[b, column] = self.labels[b, source]
                seen += bool(mask[b, column])
                positions[b, column] = max(seen - 1, 0)
        if self.mask_form != "padding":
            mask = self._expanded(mask)
        return embeds, mask, positions, None if self.labels is None else labels

    def _expanded(self, mask: Tensor) -> Tensor:
        batch, width = mask.shape
        boolean = self.mask_form == "boolean"
        dtype = torch.bool if boolean else self.embeddings.dtype
        full = torch.zeros(batch, 1, width, width, dtype=dtype)
        for b in range(batch):
            for query in range(width):
                for key in range(width):
                    sees = key <= query and bool(mask[b, key])
                    full[b, 0, query, key] = sees if boolean else (0.0 if sees else torch.finfo(dtype).min)
        return full


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...], batch: int = 5, length: int = 6) -> Case:
    """Ragged batches: any tasks, prompts of any length, rows without prompt or text, any padding and holes."""
    batch, length, hidden = draw(st.integers(0, batch)), draw(st.integers(0, length)), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, 5), max_size=4))
    task_ids = [draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)]
    longest = max((lengths[t] for t in task_ids if t >= 0), default=0) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, mask_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(MASK_DTYPES))
    mask = torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(batch)]).reshape(batch, length)
    is_table = draw(st.booleans())
    shape = (7, hidden) if is_table else (batch, length, hidden)
    return Case(
        embeddings=torch.randn(shape, generator=generator).to(dtype),
        input_ids=torch.randint(0, 7, (batch, length), generator=generator) if is_table else None,
        prompts=torch.randn(sum(lengths), hidden, generator=generator).to(
            draw(st.sampled_from([torch.float32, dtype]))
        ),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        task_ids=torch.tensor(task_ids, dtype=torch.int64),
        # Another number than 1 is kept where the dtype has one.
        attention_mask=None if mask_dtype is None else (mask * draw(st.sampled_from([1, 3]))).to(mask_dtype),
        labels=torch.randint(0, 50, (batch, length), generator=generator) if draw(st.booleans()) else None,
        padding_side=draw(st.sampled_from(["left", "right"])),
        max_prompt_length=longest,
        mask_form=draw(st.sampled_from(["padding", "padding", "boolean", "additive"])),
    )


def gradient_case(side: str, dtype: torch.dtype, batch: int = 7) -> Case:
    """A ragged batch in float32 prompts, to differentiate: rows of three tasks and of none, padded by turns."""
    generator = torch.Generator().manual_seed(0)
    pads = torch.arange(batch) * 3 % 6
    return Case(
        embeddings=torch.randn(batch, 5, 6, generator=generator).to(dtype),
        input_ids=None,
        prompts=torch.randn(9, 6, generator=generator),
        offsets=torch.tensor([0, 4, 5, 9]),
        task_ids=torch.arange(batch) * 5 % 4 - 1,
        attention_mask=(torch.arange(5) >= pads[:, None]).long(),
        labels=None,
        padding_side=side,
        max_prompt_length=5,
        mask_form="padding",
    )
