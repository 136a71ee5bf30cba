"""Ids that mean something beside text, from wherever they are told."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_softprompt.base.special_ids import placeholder_id, special_ids
from tests import tiny


def test_special_ids_come_from_both_configurations_and_the_tokenizer() -> None:
    model = tiny.tiny_model()  # begins with 0 and pads with 1
    assert special_ids(model) == {0, 1}
    model.generation_config.eos_token_id = [2, 40]
    assert special_ids(model) == {0, 1, 2, 40}
    assert special_ids(model, SimpleNamespace(all_special_ids=[0, 5])) == {0, 1, 2, 5, 40}


def test_a_placeholder_is_the_first_id_that_means_nothing() -> None:
    model = tiny.tiny_model()
    assert placeholder_id(model) == 2
    model.generation_config.eos_token_id = [2, 3]
    assert placeholder_id(model) == 4
    model.generation_config.eos_token_id = list(range(tiny.VOCABULARY))
    assert placeholder_id(model) == 0  # nothing is left
