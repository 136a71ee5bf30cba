"""What stands in for the output of the input embedding, and for what the language-modelling head is given."""

from __future__ import annotations

import torch

from lightning_softprompt.attachment.substitution import Substitution
from tests import tiny
from tests.attachment.helpers import attached_copy, inputs


def test_only_scored_positions_reach_the_head() -> None:
    for prefix in ("always", "never"):
        model, _ = attached_copy(tiny.tiny_model(), prefix, "labels")
        reached: list[int] = []
        model.lm_head.register_forward_hook(
            lambda head, args, out, reached=reached: reached.append(out.shape[:-1].numel())
        )
        batch = tiny.random_batch(0, "right")
        last = batch.attention_mask.sum(1) - 1
        labels = torch.full_like(batch.labels, -100).scatter(1, last[:, None], 7)
        model(**inputs(batch), labels=labels).loss.backward()
        assert reached == ([3, len(batch.rows)] if prefix == "always" else [len(batch.rows)])


def test_embeddings_are_replaced_once_and_where_their_shape_fits() -> None:
    embeds, output = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    this = Substitution(embeds)
    assert this.replace_embeddings(output[:, :4]).tolist() == output[:, :4].tolist(), "another look-up of the model's"
    assert this.replace_embeddings(output).tolist() == embeds.tolist()
    assert this.replace_embeddings(output).tolist() == output.tolist(), "a second look-up is the model's own"
    flat = Substitution(embeds).replace_embeddings(output.flatten(0, 1))
    assert flat.tolist() == [*embeds[0].tolist(), *embeds[1].tolist()]


def test_embeddings_looked_up_column_by_column_or_in_wider_rows() -> None:
    embeds, wide = torch.randn(2, 5, 3), torch.randn(2, 8, 3)
    turned = Substitution(embeds).replace_embeddings(torch.zeros(5, 2, 3))  # as XLNet looks them up
    assert turned.tolist() == [[embeds[row, column].tolist() for row in range(2)] for column in range(5)]
    this = Substitution(embeds)
    widened = this.replace_embeddings(wide)  # as Reformer pads its rows
    assert widened.tolist() == [[*embeds[row].tolist(), *wide[row, 5:].tolist()] for row in range(2)]
    assert this.embeds is None


def test_scored_positions_are_selected_once_by_the_head_or_from_its_logits() -> None:
    hidden, head = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    places = [(0, 1), (0, 3), (1, 0)]
    expected = torch.stack([sum(hidden[row, column, i] * head[i] for i in range(3)) for row, column in places])[None]
    for head_selects in (True, False):
        this = Substitution()
        this.scored = torch.tensor([row for row, _ in places]), torch.tensor([column for _, column in places])
        given = this.select_hidden(hidden) if head_selects else hidden
        assert given.shape == ((1, 3, 3) if head_selects else (2, 4, 3))
        assert tiny.relative_error(this.select_logits(given @ head), expected) < 1e-12
        if head_selects:
            assert this.select_hidden(given) is given
    everything = Substitution()
    assert everything.select_hidden(hidden) is hidden and everything.select_logits(hidden) is hidden
