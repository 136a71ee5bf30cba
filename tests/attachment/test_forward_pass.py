"""What a pass returns has the form that the bare model gives it."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.attachment.helpers import attached


@pytest.mark.parametrize("logits", ["all", "labels"])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str
)
def test_outputs_are_made_as_those_of_the_bare_model(kind: str, logits: str, with_labels: bool, options: dict) -> None:
    bare, model, _ = attached(kind, logits)
    for each in (bare, model):  # attentions are given by this one alone
        each.set_attn_implementation("eager")
    batch = tiny.random_batch(5, "left", ragged=False)
    given = {"input_ids": batch.input_ids, **({"labels": batch.input_ids} if with_labels else {}), **options}
    out, plain = model(**given, task_ids=batch.task_ids), bare(**given)
    keys = [key for key in plain if key != "logits" or logits == "all" or not with_labels]
    assert type(out) is type(plain) and list(out.keys()) == keys
    for key, value, inside in zip(keys, out.to_tuple(), out, strict=True):
        assert out[key] is value is getattr(out, key) and inside == key
    as_tuple = model(**given, task_ids=batch.task_ids, return_dict=False)
    assert [type(each) for each in as_tuple] == [type(out[key]) for key in keys]
    if with_labels:
        assert out[0] is out.loss and out.loss.ndim == 0 and as_tuple[0].ndim == 0
