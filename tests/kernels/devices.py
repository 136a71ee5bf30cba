"""Where the Triton kernels run in this process: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Each test of the kernels runs in both places. On a GPU they are compiled, so the CPU's turn is another process:
# `CUDA_VISIBLE_DEVICES= make test`.
DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
