"""Turning rows into token ids (examples), and examples into padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.base.padding import pad_left, padded_inputs
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.prompts.templates import TaskTemplate, columns_of, parts_of, value_text

# What has more characters without a space is no word, such as a sentence in Chinese, and is cut itself.
_LONGEST_WORD = 32


@dataclass(frozen=True)
class Example:
    """The token ids of one row's text and target.

    Attributes:
        task: whose row it is.
        text_ids: the ids of the text.
        target_ids: the ids of the target; none for a row to predict, or one whose answer a teacher writes.
        columns: the columns of a row, as they were read, where it is one to predict or may be without a target; else
            None.
    """

    task: str
    text_ids: list[int]
    target_ids: list[int]
    columns: Mapping[str, Any] | None = None


def encode(
    encoding: TaskEncoding, row: Mapping[str, Any], where: str, max_length: int, with_target: bool = True
) -> tuple[list[int], list[int]]:
    """The token ids of a row's text and of its target, at most `max_length` together.

    If a row is too long, the end of its longest column is cut. The template's own words and the target stay whole.

    Args:
        encoding: that of the row's task.
        row: the row's columns.
        where: the name of the row in errors.
        max_length: the most tokens a row may have, text and target together.
        with_target: whether to encode the target; if False, the target's ids are empty.

    Raises:
        SoftPromptError: a row that the template cannot use, a text without tokens, or a `max_length` that has no room
            for the target and the template's own words.
    """
    target = encoding.target_ids(row, where) if with_target else []
    room = max_length - len(target)
    text = encoding.text_ids(row, where)
    template = encoding.template.text
    cut = {name: value_text(row[name]) for name in columns_of(template)}
    while len(text) > room:
        longest = max(cut, key=lambda name: len(cut[name]), default=None)
        if longest is not None:
            cut[longest] = _shortened(encoding, cut[longest], excess=len(text) - room)
        if not any(value.strip() for value in cut.values()):
            raise SoftPromptError(
                f"{where}: max_length={max_length} has no room for the template and a target of {len(target)} tokens; "
                "raise it"
            )
        text = encoding.text_ids({**row, **cut}, where)
    if not text:
        raise SoftPromptError(f"{where}: the text {template!r} is empty; every row needs at least one token")
    return text, target


def _shortened(encoding: TaskEncoding, value: str, excess: int) -> str:
    """`value` without about `excess` tokens at its end, cut between two words if it has several."""
    pieces = encoding.pieces_of(value)
    room, kept = max(0, sum(count for _, count in pieces) - excess), 0
    for piece, count in pieces:
        taken = min(count, room)
        kept += len(piece) * taken // max(1, count)
        room -= taken
        if taken < count:
            break
    kept = min(kept, len(value) - 1)
    cut = value[:kept]
    words = cut.rstrip().rsplit(None, 1)
    inside_a_word = cut and not cut[-1].isspace() and not value[kept].isspace()
    return words[0] if inside_a_word and len(words) == 2 and len(words[1]) <= _LONGEST_WORD else cut.rstrip()


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be used.

    Attributes:
        task: whose row it is, as the row says it.
        target: what the row says for a target; None if it says nothing, or its task is free text.
        reason: why it cannot be used.
    """

    task: str
    target: str | None
    reason: str

    @classmethod
    def of_row(cls, tasks: Mapping[str, TaskTemplate], task: object, row: Mapping[str, Any], reason: str) -> LeftOut:
        """Of the columns of a row."""
        template = tasks.get(name := value_text(task))
        if template is None or template.labels is None or not template.has_target(row):
            return cls(name, None, reason)
        return cls(name, "".join(words for words, _ in parts_of(template.target, row, reason)), reason)

    @classmethod
    def of_example(cls, encodings: Mapping[str, TaskEncoding], example: Example, reason: str) -> LeftOut:
        """Of a row that became token ids."""
        encoding = encodings[example.task]
        labels = zip(encoding.template.labels or [], encoding.label_ids or [], strict=True)
        return cls(example.task, next((label for label, ids in labels if ids == example.target_ids), None), reason)


def check_labels_left(
    encodings: Mapping[str, TaskEncoding], examples: Sequence[Example], left_out: Sequence[LeftOut]
) -> None:
    """Check that no label loses all of its rows by those that are left out.

    Args:
        encodings: how the rows of each task became token ids.
        examples: the training rows that are kept.
        left_out: the others.

    Raises:
        SoftPromptError: a label without a row, where a row of its own is left out, or one whose target is no label, and
            may be meant for this one.
    """
    for task, encoding in encodings.items():
        labels = encoding.template.labels or []
        had = {tuple(example.target_ids) for example in examples if example.task == task}
        lost = [label for label, ids in zip(labels, encoding.label_ids or [], strict=True) if tuple(ids) not in had]
        for each in left_out:
            if each.task == task and lost and each.target is not None and each.target not in {*labels} - {*lost}:
                label = each.target if each.target in lost else lost[0]
                raise SoftPromptError(
                    f"no row of the train split has the label {label!r} of the task {task!r}, and rows of that task "
                    f"cannot be used: mend them or the label, or take it out; the first: {each.reason}"
                )


def collate(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    """Pad examples on the left to make one batch; `TaskDataModule` describes what it holds.

    Example:
        >>> batch = collate([Example("a", [5, 6], [7]), Example("b", [8], [9])], pad=0)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["tasks"]
        ([[5, 6, 7], [0, 8, 9]], [[-100, -100, 7], [-100, -100, 9]], ['a', 'b'])
    """
    rows = [example.text_ids + example.target_ids for example in examples]
    batch: dict[str, Any] = padded_inputs(rows, pad)
    batch["tasks"] = [example.task for example in examples]
    if any(example.target_ids for example in examples):
        scored = [[-100] * len(example.text_ids) + example.target_ids for example in examples]
        batch["labels"] = pad_left(scored, -100)
    return batch
