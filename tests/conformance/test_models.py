"""The page of models is not stale, and a representative of each kind of architecture still does what it says."""

from __future__ import annotations

import pytest

from tests.conformance import models
from tests.conformance.oracle import examine
from tests.conformance.sweep import PAGE

REPRESENTATIVES = (
    "llama", "gpt2", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo3", "gpt_neox", "gptj", "opt", "biogpt",
    "bloom", "mpt", "falcon", "roberta", "bert", "bart", "mixtral", "deepseek_v3", "mamba", "jamba", "qwen3_next",
    "xlnet", "deepseek_v4",
)  # fmt: skip
ROWS = {line.split(" | ")[0].strip("| `"): line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def test_the_page_holds_every_type_and_no_failure() -> None:
    assert tuple(ROWS) == models.TYPES, "transformers has other types: run make conformance"
    assert not [line for line in ROWS.values() if "FAILED" in line]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_a_type_does_what_the_page_says(model_type: str) -> None:
    assert "| " + " | ".join(examine(model_type).row()) + " |" == ROWS[model_type]
