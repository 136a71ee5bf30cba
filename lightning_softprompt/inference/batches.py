"""Answering requests in batches of similar length. Batches are halved if memory runs out; answers keep their order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import Request

logger = logging.getLogger("lightning_softprompt")

Answer = TypeVar("Answer")

_LISTED = 5  # number of failures that the warning spells out


class Answers(list[Answer | None]):
    """The answers to the requests of a call, in the order of the requests; None for a request without an answer.

    Attributes:
        failures: why a request has no answer, by the index of the request.
    """

    def __init__(self, answers: Iterable[Answer | None], failures: dict[int, str]) -> None:
        super().__init__(answers)
        self.failures = failures


def answer_in_batches(
    count: int,
    read: Callable[[int], Request],
    run: Callable[[list[Request]], list[Answer]],
    max_batch_tokens: int,
    bar: str | None,
) -> Answers[Answer]:
    """Answer requests, the longest first, so that no later batch needs more time or memory than the first.

    Args:
        count: the number of requests.
        read: makes the request at an index, or raises a `SoftPromptError`, whose message becomes the failure.
        run: answers a batch of requests.
        max_batch_tokens: the most tokens of a batch, pads included; it is halved when a batch runs out of memory.
        bar: the text in front of a progress bar over the requests; None draws no bar.
    """
    answers: Answers[Answer] = Answers([None] * count, {})
    pending = _servable(count, read, answers.failures)
    columns = (TextColumn(bar or ""), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # The bar goes to stderr, because another program may read what a command prints to stdout.
    with Progress(*columns, console=Console(stderr=True), disable=bar is None) as progress:
        shown = progress.add_task("", total=count, completed=len(answers.failures))
        while pending:
            batch = _next_batch(pending, max_batch_tokens)
            tokens = sum(request.rows for request in batch) * batch[0].length
            try:
                found = run(batch)
            except torch.OutOfMemoryError:
                if len(batch) > 1:
                    max_batch_tokens = tokens // 2
                    logger.warning("out of memory; going on with max_batch_tokens=%d", max_batch_tokens)
                    continue
                answers.failures[batch[0].index] = f"there is no memory for its {tokens} tokens; {batch[0].mend}"
            else:
                for request, answer in zip(batch, found, strict=True):
                    answers[request.index] = answer
            del pending[: len(batch)]
            progress.advance(shown, len(batch))
    answers.failures = dict(sorted(answers.failures.items()))
    _report(answers)
    return answers


def _servable(count: int, read: Callable[[int], Request], failures: dict[int, str]) -> list[Request]:
    """The requests that can be answered, the longest first; the reasons of all others are put into `failures`."""
    requests = []
    for index in range(count):
        try:
            requests.append(read(index))
        except SoftPromptError as error:
            failures[index] = str(error)
    return sorted(requests, key=lambda request: -request.length)


def _next_batch(pending: Sequence[Request], max_batch_tokens: int) -> list[Request]:
    """The next requests that fit into `max_batch_tokens` if each is as long as the first; at least the first."""
    rows = 0
    for count, request in enumerate(pending):
        rows += request.rows
        if count and rows * pending[0].length > max_batch_tokens:
            return [*pending[:count]]
    return [*pending]


def _report(answers: Answers[Answer]) -> None:
    if answers.failures:
        listed = [f"request {index}: {reason}" for index, reason in answers.failures.items()][:_LISTED]
        more = len(answers.failures) - len(listed)
        listed += [f"{more} more in answers.failures"] if more else []
        logger.warning("%d of %d requests have no answer. %s", len(answers.failures), len(answers), ". ".join(listed))
