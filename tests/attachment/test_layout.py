"""Columns of the caller and of the laid-out batch, against tables made by hand: three rows, prompts of 2, 1 and 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts
from lightning_softprompt.attachment.layout import Layout, check_gaps, lay_out
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.base.traits import ModelTraits
from tests import tiny

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
TEXT = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
LAID_OUT = {
    "left": [[-1, -1, -1, 11, 12, 13], [-1, -1, 20, 21, 22, 23], [-1, -1, -1, -1, 32, 33]],
    "right": [[-1, -1, 11, 12, 13, -1], [-1, 20, 21, 22, 23, -1], [32, 33, -1, -1, -1, -1]],
}


def layout(side: str) -> Layout:
    model = tiny.tiny_model()
    traits = replace(ModelTraits.of(model), padding_side=side)
    prompts = SoftPrompts.for_model(model, {"two": 2, "one": 1})
    text = model.get_input_embeddings()(TEXT)
    rows = TaskRows.of(prompts, ("two", "one", None))
    return lay_out(traits, prompts.packed(rows.active)[0], rows, text, MASK, None)[1]


def test_values_of_the_text_stand_behind_their_prompts_and_come_back(side: str) -> None:
    found = layout(side)
    laid_out = found.insert(TEXT, -1)
    assert laid_out.tolist() == LAID_OUT[side]
    assert torch.equal(found.insert(TEXT, torch.full((3, 6), 7)), laid_out.where(laid_out >= 0, 7))
    is_text = MASK != 0
    assert found.extract(laid_out, 1)[is_text].tolist() == TEXT[is_text].tolist()
    queries = laid_out[:, None, :, None].expand(-1, 2, -1, 5)  # as attentions have them, on the third axis
    back = found.extract(queries, 2)
    assert back.shape == (3, 2, 4, 5)
    assert all(back[:, head, :, key][is_text].tolist() == TEXT[is_text].tolist() for head in range(2) for key in (0, 4))


def test_the_mask_follows_the_text_as_it_grows_and_as_it_is_cut_back() -> None:
    found = layout("left")
    own = [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    grown = torch.cat([MASK, torch.tensor([[1, 1], [1, 0], [1, 1]])], 1)
    assert found.continued_mask(MASK, 4, held=4).tolist() == own
    assert found.continued_mask(None, 6, held=4).tolist() == [[*row, 1, 1] for row in own]
    assert found.continued_mask(grown, 6, held=4).tolist() == [own[0] + [1, 1], own[1] + [1, 0], own[2] + [1, 1]]
    assert found.continued_mask(MASK[:, :3], 3, held=3).tolist() == [row[:5] for row in own]
    # Cut back by two columns, and one of those that come is another one than before.
    other = torch.cat([MASK[:, :2], torch.tensor([[0], [1], [1]])], 1)
    expected = [[*row[:4], int(new)] for row, new in zip(own, other[:, 2], strict=True)]
    assert found.continued_mask(other, 3, held=2).tolist() == expected
    assert found.least_columns == 2 and layout("right").least_columns == 0


def test_repeated_and_selected_rows_keep_what_is_known_of_them(side: str) -> None:
    found = layout(side)
    twice = found.of_rows(6, ("two", "two", "one", "one", None, None))
    assert twice.insert(TEXT.repeat_interleave(2, 0), -1).tolist() == [row for row in LAID_OUT[side] for _ in range(2)]
    order = torch.tensor([2, 0, 0])
    chosen = found.select(order)
    assert chosen.tasks == (None, "two", "two") and chosen.prompt_lengths.tolist() == [0, 2, 2]
    assert chosen.insert(TEXT[order], -1).tolist() == [LAID_OUT[side][row] for row in (2, 0, 0)]
    assert found.of_rows(3, None) is found
    with pytest.raises(SoftPromptError, match="the cache holds 3 rows, the input 4"):
        found.of_rows(4, None)
    with pytest.raises(
        SoftPromptError, match=r"filled for tasks \['two', 'one', None\], the call names \['one', 'two', None\]"
    ):
        found.of_rows(3, ("one", "two", None))


def test_pads_inside_of_rows_are_refused_beyond_what_a_window_holds() -> None:
    traits = replace(ModelTraits.of(tiny.tiny_model()), longest_with_gaps=5)
    for mask in ([[0, 1, 1, 1, 1, 1]], [[1, 1, 1, 1, 0, 0]], [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]):
        check_gaps(traits, torch.tensor(mask))
    check_gaps(traits, torch.tensor([[1, 0, 1, 1, 1]]))
    check_gaps(replace(traits, longest_with_gaps=None), torch.tensor([[1, 0, 1, 1, 1, 1]]))
    with pytest.raises(
        SoftPromptError, match="LlamaForCausalLM looks back at 5 columns, the rows have 6 by now, and pads stand"
    ):
        check_gaps(traits, torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]]))


@pytest.mark.parametrize(
    ("mask", "has_them"),
    [([[0, 1, 1], [0, 0, 1]], False), ([[1, 1, 1], [1, 1, 1]], False), ([[1, 1, 1], [1, 1, 0]], True)],
)
def test_pads_behind_text_are_inner_ones(mask: list[list[int]], has_them: bool) -> None:
    assert replace(layout("left"), attention_mask=torch.tensor(mask)).has_inner_pads == has_them
