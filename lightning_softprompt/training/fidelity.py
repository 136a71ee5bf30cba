"""How near a distilled prompt is to its teacher on rows that it never saw, and what it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_softprompt.base.padding import padded_inputs
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.inference.requests import attached_prompts
from lightning_softprompt.training.lessons import Lessons

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS_AT_ONCE = 16
_TIMED = 5


@dataclass(frozen=True)
class Fidelity:
    """A student beside its teacher, on held-out rows of one task.

    Attributes:
        task: the task.
        rows: the number of rows.
        tokens_before: tokens in front of a text where the hard prompt stands in the request; what a chat template
            writes for the system counts.
        tokens_after: the same with the soft prompt, its virtual tokens among them.
        divergence: KL(teacher ‖ student) in nats, the mean over the positions of the answers.
        divergence_without: the same for the texts without a prompt: what the hard prompt changes at all.
        equal_first: the share of rows, in percent, in which both find the same first token likeliest.
        equal_answers: the share of rows, in percent, whose answers are equal, to the last token.
        seconds_before: the median time of one request by itself that holds the hard prompt, answered with as many
            tokens as the teacher's answer has.
        seconds_after: the same with the soft prompt, which is kept as a prefix where the model takes one.
        text: the first of the rows: what its columns put into the template, or, of a row that has none, what the
            teacher reads behind the hard prompt.
        answer_before: what the teacher answers to it.
        answer_after: what the student answers to it.
    """

    task: str
    rows: int
    tokens_before: int
    tokens_after: int
    divergence: float
    divergence_without: float
    equal_first: float
    equal_answers: float
    seconds_before: float
    seconds_after: float
    text: str
    answer_before: str
    answer_after: str


def rows_to_read(rows: Sequence[Example]) -> int:
    """How many rows `measure_fidelity` reads: all, and some again, one by one, to take the time."""
    return len(rows) + 1 + len(rows[:_TIMED])


@torch.no_grad()
def measure_fidelity(
    model: PreTrainedModel,
    lessons: Lessons,
    task: str,
    rows: Sequence[Example],
    advance: Callable[[int], None] = lambda count: None,
) -> Fidelity:
    """Compare a student with its teacher.

    Args:
        model: a causal LM to which both are attached.
        lessons: of the teacher.
        task: the task of the student.
        rows: rows of this task, at least one. Those without a target are judged at their teacher's answer.
        advance: is told how many more of the `rows_to_read` are read.
    """
    teacher, length = lessons.teachers[task], len(attached_prompts(model)[task])
    divergences, without, firsts, wanted, found = [], [], [], [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        of_part = rows[start : start + _ROWS_AT_ONCE]
        part = lessons.with_answers(of_part)
        taught, student = lessons.taught(part), lessons.learned(part)
        divergences.append(taught.divergence(student))
        without.append(taught.divergence(lessons.learned(part, with_prompts=False)))
        is_equal = (taught.first() == student.argmax(-1)).float()
        firsts += [of_row[0] for of_row in is_equal.split([len(row.target_ids) for row in part])]
        wanted += [row.target_ids for row in lessons.with_answers([replace(row, target_ids=[]) for row in of_part])]
        found += lessons.answers(of_part, by_students=True)
        advance(len(of_part))
    equal = [one == other for one, other in zip(wanted, found, strict=True)]
    before, after = _seconds(model, lessons, rows[:_TIMED], [len(answer) for answer in wanted], advance)
    return Fidelity(
        task,
        len(rows),
        len(teacher.ids),
        len(teacher.head) + length,
        float(torch.cat(divergences).mean()),
        float(torch.cat(without).mean()),
        100 * float(torch.stack(firsts).mean()),
        100 * sum(equal) / len(equal),
        before,
        after,
        lessons.said_in(rows[0]),
        *map(lessons.words, (wanted[0], found[0])),
    )


def _seconds(
    model: PreTrainedModel,
    lessons: Lessons,
    rows: Sequence[Example],
    counts: Sequence[int],
    advance: Callable[[int], None],
) -> tuple[float, float]:
    """The median seconds of a request with the hard prompt, and with the soft one, each row in turn."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number, row in enumerate([rows[0], *rows]):  # the first one is a warm-up
        teacher, count = lessons.teachers[row.task], max(1, counts[max(0, number - 1)])
        hard = [*teacher.ids, *teacher.text_ids(row.text_ids)]
        for times, ids, task in zip(taken, (hard, row.text_ids), (None, row.task), strict=True):
            start = time.perf_counter()
            _generate(model, ids, task, count, lessons.pad)
            times.append(time.perf_counter() - start)
        advance(1)
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def _generate(model: Any, ids: list[int], task: str | None, count: int, pad: int) -> list[list[int]]:
    inputs = padded_inputs([ids], pad, model.device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": pad}
    return model.generate(**inputs, tasks=[task], **options).tolist()  # a GPU has done its work when it is a list
