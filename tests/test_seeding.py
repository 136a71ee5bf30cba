"""Random streams of their own: known from their parts alone, in every process."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import torch

from lightning_softprompt.seeding import generator


def drawn(*parts: object) -> list[int]:
    return torch.randint(1 << 30, (4,), generator=generator(*parts)).tolist()


def test_the_seed_is_the_beginning_of_a_hash_of_all_parts() -> None:
    digest = hashlib.sha256(b"3:tone:0").hexdigest()[:8]
    seed = int(digest[6:8] + digest[4:6] + digest[2:4] + digest[0:2], 16)
    assert generator(3, "tone", 0).initial_seed() == seed
    expected = torch.randint(1 << 30, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert drawn(3, "tone", 0) == expected


def test_streams_differ_in_each_part_and_in_their_order() -> None:
    parts = [(0,), (1,), (1 << 32,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, 1), (1, 0), (0, 11), (0, 1, 1)]
    for one, other in itertools.combinations(parts, 2):
        assert drawn(*one) != drawn(*other), (one, other)


def test_a_stream_is_its_own_whatever_else_is_drawn_and_in_every_process() -> None:
    before = torch.get_rng_state()
    expected = drawn(0, "情感")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert drawn(0, "情感") == expected
    code = "from tests.test_seeding import drawn; print(drawn(0, '\\u60c5\\u611f'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
