"""Presence: counters that only grow, read by several readers, none of which takes anything from another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.presence import Presence
from tests import tiny
from tests.attachment.helpers import attached


def test_each_reader_remembers_by_itself_what_it_has_seen() -> None:
    presence = Presence()
    presence.count(["a", "b"])
    found, first = presence.since({})
    assert found == {"a", "b"}
    presence.count(["b"])
    presence.count([])
    found, second = presence.since(first)
    assert found == {"b"} and presence.since(second)[0] == set()
    assert presence.since({})[0] == {"a", "b"} and presence.passes == 3


def test_no_count_is_lost_between_threads() -> None:
    presence = Presence()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [presence.count(["a"]) for _ in range(500)], range(8)))
    assert presence.passes == 4000 and presence.since({"a": 3999})[0] == {"a"} and not presence.since({"a": 4000})[0]


def test_passes_that_record_gradients_are_counted_with_the_tasks_of_their_rows() -> None:
    _, model, _ = attached("llama")
    presence, text = attachment_of(model).presence, torch.tensor([[9, 8], [7, 6]])
    with torch.no_grad():
        model(text, tasks=["long", "short"])
    assert presence.passes == 1 and not presence.since({})[0]
    model(text, tasks=["long", None])
    assert presence.passes == 2 and presence.since({})[0] == {"long"} and "long" in tiny.HARD
