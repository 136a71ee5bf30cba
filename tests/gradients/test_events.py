"""What an event says to people, and that a checkpoint gives it back."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import get_args

import pytest
import torch

from lightning_softprompt.gradients.events import Event
from lightning_softprompt.gradients.guard import Action


@pytest.mark.parametrize(
    "action, done",
    [
        ("warn", "nothing was done"),
        ("skip", "the task's step was skipped"),
        ("rewind", "the task was put back"),
        ("stop", "training stops"),
    ],
)
def test_an_event_says_when_whose_what_and_what_was_done(action: str, done: str) -> None:
    event = Event(7, "topic", "spike", action, "gradient norm 300, the largest so far was 2")
    assert str(event) == f"step 7, task 'topic': gradient norm 300, the largest so far was 2; {done}"


def test_every_action_of_the_guard_has_words_of_its_own() -> None:
    said = {str(Event(0, "topic", "spike", action, "odd")) for action in get_args(Action)}
    assert len(said) == len(get_args(Action)) == 4


def test_an_event_comes_back_from_a_checkpoint_equal() -> None:
    event, file = Event(7, "topic", "collapse", "rewind", "loss 3, at the start 2"), io.BytesIO()
    torch.save(asdict(event), file)
    file.seek(0)
    again = Event(**torch.load(file, weights_only=True))
    assert again == event and str(again) == str(event)
    assert again != Event(8, "topic", "collapse", "rewind", "loss 3, at the start 2")
