"""Answering requests in batches of similar length. Batches are halved if memory runs out; answers keep their order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.answers import Answers, Found
from lightning_softprompt.inference.requests import Request

logger = logging.getLogger("lightning_softprompt")

_LISTED = 5  # number of failures that the warning spells out


def answer_in_batches(
    count: int,
    read: Callable[[int], Request],
    run: Callable[[list[Request]], Sequence[Found | SoftPromptError]],
    max_batch_tokens: int,
    bar: str | None,
) -> Answers[Found]:
    """Answer requests, the longest first, so that no later batch needs more time or memory than the first.

    Args:
        count: the number of requests.
        read: makes the request at an index, or raises a `SoftPromptError`, whose message becomes the failure.
        run: answers a batch of requests, which all have labels or all have none; in place of an answer it may give the
            reason why there is none.
        max_batch_tokens: the most tokens of a batch, pads included; it is halved when a batch runs out of memory.
        bar: the text in front of a progress bar over the requests; None draws no bar.
    """
    answers: Answers[Found] = Answers([None] * count, {})
    columns = (TextColumn(bar or ""), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def run_to_the_end(batch: list[Request]) -> Iterator[tuple[int, Found | SoftPromptError]]:
        return zip([request.index for request in batch], run(batch), strict=True)

    # The bar goes to stderr, because another program may read what a command prints to stdout.
    with Progress(*columns, console=Console(stderr=True), disable=bar is None) as progress:
        shown = progress.add_task("", total=count)
        pending = servable(count, read, answers.failures)
        found = in_batches(pending, run_to_the_end, max_batch_tokens, answers.failures)
        answered = 0
        for index, answer in found:
            if isinstance(answer, SoftPromptError):
                answers.failures[index] = str(answer)
            else:
                answers[index] = answer
                answered += 1
            progress.update(shown, completed=answered + len(answers.failures))
        progress.update(shown, completed=count)
    answers.failures = dict(sorted(answers.failures.items()))
    report(answers.failures, count)
    return answers


def in_batches(
    pending: list[Request],
    run: Callable[[list[Request]], Iterator[tuple[int, Found]]],
    max_batch_tokens: int,
    failures: dict[int, str],
) -> Iterator[tuple[int, Found]]:
    """What `run` gives for one batch of requests after the other.

    Args:
        pending: the requests, in the order in which they are run.
        run: gives answers, or parts of answers, each with the index of its request.
        max_batch_tokens: the most tokens of a batch, pads included. If a batch runs out of memory, it is run again from
            its beginning, in halves, and so are all later ones.
        failures: where the reason is put if there is no memory for a request that is alone in its batch, or if a batch
            fails while others do not.

    Raises:
        Exception: what `run` raised, if it raised for every batch.
    """
    pending, has_served, first = [*pending], False, None
    while pending:
        batch = _next_batch(pending, max_batch_tokens)
        tokens = sum(request.rows for request in batch) * batch[0].length
        try:
            yield from run(batch)
            has_served = True
        except torch.OutOfMemoryError:
            if len(batch) > 1:
                max_batch_tokens = tokens // 2
                logger.warning("out of memory; going on with max_batch_tokens=%d", max_batch_tokens)
                continue
            failures[batch[0].index] = f"there is no memory for its {tokens} tokens; {batch[0].mend}"
        except SoftPromptError:
            raise
        except Exception as error:  # of the device, for example
            first = first or error
            failures.update({request.index: f"its batch failed: {type(error).__name__}: {error}" for request in batch})
        del pending[: len(batch)]
    if first is not None and not has_served:
        raise first  # what every batch fails of is none of a request's, but of the call


def check_budget(max_batch_tokens: int) -> None:
    """Raise a `SoftPromptError` if no batch may have any tokens."""
    if max_batch_tokens < 1:
        raise SoftPromptError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")


def servable(count: int, read: Callable[[int], Request], failures: dict[int, str]) -> list[Request]:
    """The requests that can be answered, in the order in which they are run.

    Those with labels come first, as labels and free text share no batch, and among either kind the longest. The reasons
    of all requests that cannot be answered are put into `failures`.
    """
    requests = []
    for index in range(count):
        try:
            requests.append(read(index))
        except SoftPromptError as error:
            failures[index] = str(error)
    return sorted(requests, key=lambda request: (not request.labels, -request.length))


def _next_batch(pending: Sequence[Request], max_batch_tokens: int) -> list[Request]:
    """The next requests of one kind that fit into `max_batch_tokens` if each is as long as the first; at least that."""
    rows = 0
    for count, request in enumerate(pending):
        rows += request.rows
        fits = rows * pending[0].length <= max_batch_tokens and bool(request.labels) == bool(pending[0].labels)
        if count and not fits:
            return [*pending[:count]]
    return [*pending]


def report(failures: dict[int, str], count: int) -> None:
    """Warn once if any of `count` requests have failed."""
    if failures:
        listed = [f"request {index}: {reason}" for index, reason in failures.items()][:_LISTED]
        more = len(failures) - len(listed)
        listed += [f"{more} more in answers.failures"] if more else []
        logger.warning("%d of %d requests have no answer. %s", len(failures), count, ". ".join(listed))
