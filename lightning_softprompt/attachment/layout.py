"""How a batch is laid out: which columns of the model's input hold prompt, text and pads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from softprompt_kernels import PromptConcat, prompt_concat
from torch import Tensor

from lightning_softprompt.attachment.routing import TaskRows, Tasks
from lightning_softprompt.attachment.substitution import with_gradient
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError


@dataclass(frozen=True)
class Layout:
    """The layout of a batch, whose rows hold their prompts and their texts. It is kept with the cache that it filled.

    `softprompt_kernels.prompt_concat` builds the layout. This translates between its columns and the caller's:
    text column `j` of row `b` stands at column `j + shift[b]`.

    Attributes:
        active: the distinct tasks of the rows that it was made for.
        places: int64 `[batch]`, the position of each row's task among the active ones, -1 for no prompt.
        prompt_lengths: int64 `[batch]`.
        first: int64 `[batch]`, the first text column whose mask is set.
        shift: int64 `[batch]`.
        attention_mask: `[batch, width]`, of the laid-out columns.
        text_length: the caller's number of columns.
        is_left: pads stand on the left.
        seen: columns of text that passed through the cache so far.
    """

    active: tuple[str, ...]
    places: Tensor
    prompt_lengths: Tensor
    first: Tensor
    shift: Tensor
    attention_mask: Tensor
    text_length: int
    is_left: bool
    seen: int

    @property
    def tasks(self) -> Tasks:
        """The tasks of the rows, None for none; waits for the device."""
        return tuple(None if place < 0 else self.active[place] for place in self.places.tolist())

    @property
    def extra(self) -> int:
        """The number of columns that the laid-out batch has beyond the caller's."""
        return self.attention_mask.shape[1] - self.text_length

    @property
    def has_inner_pads(self) -> bool:
        """Whether masked columns follow unmasked ones, as they do in ragged batches padded on the right."""
        mask = self.attention_mask != 0
        return bool((mask[:, :-1] & ~mask[:, 1:]).any())

    @property
    def least_columns(self) -> int:
        """The fewest columns of text that a cache must keep so that every prompt stands in it."""
        return int(self.first.max()) if self.is_left else 0

    def insert(self, values: Tensor, fill: Tensor | int) -> Tensor:
        """Bring `values` of the caller's columns, `[batch, length]`, to the laid-out columns; others hold `fill`."""
        width = self.attention_mask.shape[1]
        source = torch.arange(width, device=values.device) - self.shift[:, None]
        is_text = (source >= self.first[:, None]) & (source < self.text_length)
        return torch.where(is_text, values.gather(1, source.clamp(0, max(self.text_length - 1, 0))), fill)

    def extract(self, values: Tensor, dim: int) -> Tensor:
        """Bring laid-out `values` back to the caller's columns along `dim`. Pads get the values of any column."""
        if self.is_left:
            return values.narrow(dim, self.extra, self.text_length)
        columns = torch.arange(self.text_length, device=values.device) + self.shift[:, None]
        shape = [1] * values.ndim
        shape[0], shape[dim] = columns.shape
        return torch.take_along_dim(values, columns.clamp(min=0).view(shape), dim)

    def of_rows(self, rows: int, tasks: Tasks | None) -> Layout:
        """The layout of a batch that continues with `rows` rows, and whose tasks are named again or not at all.

        Raises:
            SoftPromptError: other rows, or other tasks.
        """
        held = len(self.places)
        if not held or rows % held:
            raise SoftPromptError(f"the cache holds {held} rows, the input {rows}; pass the same rows")
        layout = self.repeated(rows // held)
        if tasks is not None and tasks != layout.tasks:
            raise SoftPromptError(
                f"the cache was filled for tasks {list(layout.tasks)}, the call names {list(tasks)}; "
                "pass the same tasks or none, or start with an empty cache"
            )
        return layout

    def repeated(self, times: int) -> Layout:
        """The layout of a batch whose rows were each repeated in place (beams, returned sequences)."""
        if times == 1:
            return self
        return self.select(torch.arange(len(self.places), device=self.places.device).repeat_interleave(times))

    def select(self, rows: Tensor) -> Layout:
        """The layout of these rows, as caches select and reorder them."""
        names = ("places", "prompt_lengths", "first", "shift", "attention_mask")
        chosen = {name: getattr(self, name).index_select(0, rows.to(self.places.device)) for name in names}
        return replace(self, **chosen)

    def continued_mask(self, text_mask: Tensor | None, text_columns: int, held: int) -> Tensor:
        """The laid-out mask once the text has `text_columns` columns. New columns stand behind all others.

        A text cut back below the layout's own length (rejected draft tokens) cuts the laid-out columns alike.

        Args:
            text_mask: of the whole text, of which the columns behind the layout's own are read; None for ones.
            text_columns: of the whole text.
            held: columns of it that the cache holds.
        """
        kept = self.attention_mask[:, : min(held, self.text_length) + self.extra]
        new = text_columns + self.extra - kept.shape[1]
        if text_mask is None:
            return torch.cat([kept, kept.new_ones(kept.shape[0], new)], dim=1)
        return torch.cat([kept, text_mask[:, text_mask.shape[1] - new :].to(kept.dtype)], dim=1)


def check_gaps(traits: ModelTraits, mask: Tensor) -> None:
    """Raise a `SoftPromptError` where pads inside of rows count as distance, or are read.

    Args:
        traits: of the model.
        mask: of all laid-out columns so far.
    """
    most, columns = traits.longest_with_gaps, mask.shape[1]
    if most is None or columns <= most:
        return
    is_set = mask != 0
    is_behind, is_before = is_set.cumsum(1) > 0, is_set.flip(1).cumsum(1).flip(1) > 0
    if bool((is_behind & ~is_set & is_before).any()):
        counts = f"looks back at {most} columns" if most else "counts columns or reads pads"
        raise SoftPromptError(
            f"{type(traits.model).__name__} {counts}, the rows have {columns} by now, and pads stand inside of them, "
            "behind a prompt or an earlier text; leave prefill_chunk_size out, give rows of equal length or one by "
            "one, or attach with prefix='never'"
        )


def lay_out(
    traits: ModelTraits,
    packed: Tensor,
    rows: TaskRows,
    text: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[PromptConcat, Layout]:
    """Put prompts in front of embedded text `[batch, length, hidden]`; `packed` are those of the rows' active tasks."""
    device = text.device
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.int64, device=device)
    elif mask.is_floating_point():
        mask = (mask != 0).long()
    there = rows.on(device)
    longest = max(rows.lengths, default=0)
    out = prompt_concat(
        text,
        None,
        packed.to(device),
        there.offsets,
        there.places,
        mask.to(device),
        None if labels is None else labels.to(device),
        padding_side=traits.padding_side,
        max_prompt_length=longest,
    )
    out = out._replace(inputs_embeds=with_gradient(out.inputs_embeds))
    first = ((mask != 0).cumsum(1) == 0).sum(1).to(device)
    is_left = traits.padding_side == "left"
    shift = torch.full_like(first, longest) if is_left else there.lengths - first
    length = text.shape[1]
    kept = rows.active, there.places, there.lengths
    return out, Layout(*kept, first, shift, out.attention_mask, length, is_left, seen=length)


def lay_out_positions(traits: ModelTraits, layout: Layout, positions: Tensor, counted: Tensor) -> Tensor:
    """A user's own positions, shifted by the prompts' lengths.

    Args:
        traits: of the model.
        layout: of the rows.
        positions: of the text, `[batch or 1, length]`, or several kinds of them, `[kinds, batch or 1, length]`.
        counted: of the laid-out columns, as the model would have them: what prompts and pads get.
    """
    if positions.ndim == 3:
        return torch.stack([lay_out_positions(traits, layout, kind, counted) for kind in positions])
    positions = positions.expand(len(layout.places), -1)
    # `generate` counts from 0, whatever the model's offset is; a prompt's positions begin where its text's would.
    start = positions.gather(1, layout.first.clamp(max=positions.shape[1] - 1)[:, None])
    origin = torch.where(start >= traits.position_offset, traits.position_offset, 0)
    return layout.insert(positions + layout.prompt_lengths[:, None], counted + origin)


def lay_out_types(layout: Layout, types: Tensor) -> Tensor:
    """Types of tokens `[batch, length]`, laid out. A prompt has the type of its row's first token."""
    return layout.insert(types, types.gather(1, layout.first.clamp(max=types.shape[1] - 1)[:, None]))
