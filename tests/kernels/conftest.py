"""Fixtures of the tests of the kernels."""

from __future__ import annotations

import pytest
from softprompt_kernels import triton_concat, triton_gradients

from tests.kernels.devices import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the Triton kernels run."""
    return request.param


@pytest.fixture
def small_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tiny blocks: small cases reach every loop, and masked ends of every block."""
    if device == "cuda":
        return
    for module in (triton_concat, triton_gradients):
        monkeypatch.setattr(module, "TILE_ELEMENTS", 16)
    monkeypatch.setattr(triton_concat, "_SCAN_BLOCK", 4)
    monkeypatch.setattr(triton_concat, "_QUERY_BLOCK", 2)
    monkeypatch.setattr(triton_concat, "_KEY_BLOCK", 4)
    monkeypatch.setattr(triton_gradients, "_ROW_BLOCK", 2)
    monkeypatch.setattr(triton_gradients, "_HIDDEN_BLOCK", 4)
    monkeypatch.setattr(triton_gradients, "_SPLIT_ROWS", 4)
