"""The loss: pads do not count, positions without a label cost no logits, and the caller may say what to divide by."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.attachment.helpers import attached, attached_copy, inputs, mean_loss_of_rows


@pytest.mark.usefixtures("route")
def test_labels_at_pads_do_not_count(kind: str, side: str) -> None:
    bare, model, _ = attached(kind)
    batch = tiny.random_batch(3, side)
    with torch.no_grad():
        loss = (
            model(batch.input_ids, batch.attention_mask, labels=batch.input_ids, task_ids=batch.task_ids).loss
            if kind == "llama"
            else model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.input_ids,
                task_ids=batch.task_ids,
            ).loss
        )
    assert float(loss) == pytest.approx(mean_loss_of_rows(bare, batch), rel=1e-6)


@pytest.mark.usefixtures("route")
def test_logits_labels_gives_the_same_loss_and_gradient_without_logits(kind: str, side: str) -> None:
    batch = tiny.random_batch(9, side)
    labels = batch.labels.clone()
    labels[:, ::2] = -100
    results = []
    for logits in ("all", "labels"):
        _, model, prompts = attached(kind, logits=logits)
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            task_ids=batch.task_ids,
        )
        out.loss.backward()
        results.append((out, {task: prompts[task].grad for task in prompts.tasks}))
    (full, gradients), (scored, gradients_scored) = results
    assert scored.logits is None and full.logits is not None
    torch.testing.assert_close(scored.loss, full.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_scored, gradients, rtol=1e-4, atol=1e-6)
    assert (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits
        is not None
    )


def test_a_loss_over_a_given_number_of_items() -> None:
    batch, losses = tiny.random_batch(0, "right"), []
    for prefix in ("always", "never"):
        for logits in ("all", "labels"):
            model, _ = attached_copy(tiny.tiny_model(), prefix, logits)
            losses.append(model(**inputs(batch, labels=True), num_items_in_batch=7).loss.item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
