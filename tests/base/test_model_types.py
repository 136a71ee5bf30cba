"""Exceptions for types of models, against the names that transformers has for them."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig, ReformerConfig

from lightning_softprompt.base import model_types
from lightning_softprompt.base.model_types import reason_against_soft_prompts

EXCEPTIONS = {name: value for name, value in vars(model_types).items() if name.isupper() and not name.startswith("_")}


def test_every_exception_is_for_a_type_that_transformers_has_and_says_why() -> None:
    assert {"NO_SOFT_PROMPT", "PADDED_ON_THE_RIGHT"} <= set(EXCEPTIONS)
    known = {*CONFIG_MAPPING, "dory"}  # of transformers 5.24, and another one may be installed
    for name, reasons in EXCEPTIONS.items():
        for model_type, reason in reasons.items():
            assert model_type in known, (name, model_type)
            assert len(reason.split()) > 3


@pytest.mark.parametrize(
    "model_type, word", [("gemma3n_text", "per layer"), ("blt", "patches"), ("cpmant", "from the")]
)
def test_a_type_that_reads_ids_is_refused_with_its_reason(model_type: str, word: str) -> None:
    assert word in reason_against_soft_prompts(CONFIG_MAPPING[model_type]())
    assert reason_against_soft_prompts(LlamaConfig()) is None


def test_of_reformers_those_that_hash_their_rows_are_refused() -> None:
    assert reason_against_soft_prompts(ReformerConfig(attn_layers=["local", "local"])) is None
    assert "hashes of a row" in reason_against_soft_prompts(ReformerConfig(attn_layers=["local", "lsh"]))
