"""Independent random streams, one for each thing that draws random numbers."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded from all of `parts`: the run's seed, and what tells this stream from the others.

    What draws from it has to name the CPU too: inside Lightning's `configure_model` the default device is the GPU.

    The parts are hashed, not packed side by side, because PyTorch's CPU generator uses only 32 bits of a seed.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
