"""Random streams of their own for whatever draws."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A generator seeded from all of `parts`: the seed, and what tells this stream from others.

    PyTorch's CPU generator takes 32 bits of a seed, so seeds are hashed together, not packed.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
