"""Which row belongs to which task: by name, by index, or the only one there is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach, detach
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.routing import from_batch
from tests import tiny
from tests.attachment.helpers import attached, attached_copy
from tests.conformance import models

pytestmark = pytest.mark.usefixtures("route")


def test_names_and_task_ids_route_alike(kind: str) -> None:
    _, model, prompts = attached(kind)
    batch = tiny.random_batch(5, "left")
    names = [prompts.tasks[i] if i >= 0 else None for i in batch.task_ids.tolist()]
    with torch.no_grad():
        by_id = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids).logits
        array = batch.task_ids.numpy()
        others = [{"tasks": names}, {"task_ids": names}, {"task_ids": batch.task_ids.tolist()}]
        others += [{"task_ids": array}, {"task_ids": list(array)}, {"tasks": np.array(names, dtype=object)}]
        for other in others:
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **other).logits
            assert torch.equal(by_id, found)


def test_one_number_for_all_rows_is_refused() -> None:
    _, model, _ = attached("llama")
    for ids in (np.int64(1), np.array(1), np.array([[0], [1]])):
        with pytest.raises(SoftPromptError, match="a list with one task a row"):
            model(torch.tensor([[9, 8], [7, 6]]), task_ids=ids)


def test_one_task_needs_no_routing_and_several_do(kind: str) -> None:
    model = tiny.tiny_model(kind)
    attach(model, SoftPrompts.for_model(model, {"only": 3}))
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, tasks=["only", "only"]).logits)
    detach(model)
    attach(model, SoftPrompts.for_model(model, {"a": 3, "b": 2}))
    with pytest.raises(SoftPromptError, match=r"2 tasks .* which row is which; pass task_ids"):
        model(ids)
    with pytest.raises(SoftPromptError, match=r"2 tasks .* which row is which"):
        model.generate(ids, max_new_tokens=1)
    # A refused call leaves nothing behind.
    assert model(ids, task_ids=torch.tensor([0, -1])).logits.shape[:2] == (2, 2)


def test_a_tensor_is_read_again_once_its_values_changed() -> None:
    _, model, _ = attached("llama")
    attachment, ids = attachment_of(model), torch.tensor([[9, 8], [7, 6]])
    assert attachment is not None
    for given in (torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 2]])[0]):
        with torch.no_grad(), attachment.routed(given):
            first = model(ids, task_ids=given).logits
            given.copy_(torch.tensor([1, 0]))
            found, expected = model(ids, task_ids=given).logits, model(ids, task_ids=[1, 0]).logits
        assert torch.equal(found, expected) and not torch.equal(found, first)
    given = torch.tensor([0, 1])
    with torch.no_grad(), attachment.routed(given):
        given.numpy()[:] = [1, 0]  # which no version tells
        assert torch.equal(model(ids, task_ids=given).logits, model(ids, task_ids=[1, 0]).logits)
    with torch.inference_mode():
        given = torch.tensor([0, 1])
        with attachment.routed(given):
            assert torch.equal(model(ids, task_ids=given).logits, model(ids, task_ids=[0, 1]).logits)


def test_one_part_of_a_batch_may_carry_the_routing() -> None:
    ids, labels = torch.tensor([0, 1]), torch.zeros(2)
    for batch in (
        {"task_ids": ids},
        ({"task_ids": ids}, labels),
        [labels, {"tasks": ids}],
        (({"task_ids": ids}, 1), "y"),
    ):
        assert from_batch(batch) is ids
    for batch in ((labels, labels), ({"text": "a"}, None), ({"task_ids": ids}, {"tasks": ["a", "b"]}), None, [ids]):
        assert from_batch(batch) is None
    with pytest.raises(SoftPromptError, match="both task_ids and tasks are given"):
        from_batch(({"task_ids": ids, "tasks": ["a", "b"]}, labels))


@pytest.mark.parametrize("model_type", ["llama", "bart"])  # without a cache, and row by row
def test_a_task_that_goes_in_mid_generation_changes_no_other_row(model_type: str) -> None:
    bare = models.build(model_type)
    model, prompts = attached_copy(bare, "auto")
    rows = [tiny.Row(1, tiny.HARD["short"], [9, 8, 7]), tiny.Row(2, tiny.HARD["one"], [5, 6])]

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if "long" in prompts:
            prompts.remove("long")  # the indices of the others are other ones from now on
        return scores

    ids, mask = torch.tensor([[9, 8, 7], [1, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    out = model.generate(
        ids, attention_mask=mask, task_ids=torch.tensor([1, 2]), logits_processor=[processor], **options
    )
    assert out[:, 3:].tolist() == [tiny.hard_greedy(bare, row, 5, do_sample=False)[0] for row in rows]


def test_the_only_task_stays_that_of_a_generation_when_another_one_comes() -> None:
    bare = tiny.tiny_model()
    model = copy.deepcopy(bare)
    prompts = SoftPrompts.for_model(model, {"one": Tokens([33])})
    attach(model, prompts)

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(prompts) == 1:
            prompts.add("another", torch.zeros(2, 32))
        return scores

    out = model.generate(
        torch.tensor([[9, 8, 7]]), max_new_tokens=5, do_sample=False, use_cache=False, logits_processor=[processor]
    )
    assert out[:, 3:].tolist() == tiny.hard_greedy(bare, tiny.Row(0, [33], [9, 8, 7]), 5, do_sample=False)
