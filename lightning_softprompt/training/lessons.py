"""What teachers say of rows: the answers that are missing, and the distributions to learn from. Each is found once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.data.encoding import Example
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import most_tokens
from lightning_softprompt.inference.task_answers import TaskAnswers
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.prompts.templates import columns_of, value_text
from lightning_softprompt.training.divergence import Taught, answer_log_probabilities
from lightning_softprompt.training.teachers import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Key = tuple[str, tuple[int, ...], tuple[int, ...]]


class Lessons:
    """The teachers of a model, asked about the rows of their students.

    Args:
        model: a causal LM to which students and teachers are attached.
        tokenizer: the model's tokenizer.
        teachers: by the task of the student.
        encodings: of the students' tasks.
        max_new_tokens: the most tokens of an answer that a teacher writes.
        top_k: how many of the likeliest tokens are kept for each position of an answer; None keeps nothing, and the
            teacher is asked anew each time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        teachers: Mapping[str, Teacher],
        encodings: Mapping[str, TaskEncoding],
        max_new_tokens: int,
        top_k: int | None,
    ) -> None:
        self.teachers = teachers
        self.pad = pad_token_id(tokenizer, vocabulary_size(model))
        self._model = model
        self._tokenizer = tokenizer
        self._encodings = encodings
        self._max_new_tokens = max_new_tokens
        self._top_k = top_k
        self._positions = most_tokens(model)
        self._written: dict[_Key, list[int]] = {}
        self._stored: dict[_Key, Taught] = {}

    def with_answers(self, rows: Sequence[Example]) -> list[Example]:
        """The rows, each without a target with its teacher's answer in place of it.

        That is the likeliest of the task's labels, or the greedy continuation, with a token behind it where it ended.

        Raises:
            SoftPromptError: a row of a task without a teacher, or one that its teacher cannot answer.
        """
        missing = {_key(row): row for row in rows if not row.target_ids and _key(row) not in self._written}
        if missing:
            self._written.update(zip(missing, self.answers(list(missing.values())), strict=True))
        return [row if row.target_ids else replace(row, target_ids=self._written[_key(row)]) for row in rows]

    @torch.no_grad()
    def taught(self, rows: Sequence[Example]) -> Taught:
        """What the teachers say at the positions of the rows' answers, over the whole vocabulary.

        Raises:
            SoftPromptError: a row that is too long for the model behind its teacher.
        """
        texts = [self._text_ids(row) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            length = len(self.teachers[row.task].ids) + len(text) + len(row.target_ids)
            if self._positions is not None and length > self._positions:
                raise SoftPromptError(
                    f"the teacher of {row.task!r}, a row and its answer have {length} tokens, and the model "
                    f"{self._positions} positions; shorten the teacher, or lower max_length or max_new_tokens"
                )
        return Taught(self._said(rows, texts, [self.teachers[row.task].name for row in rows]))

    def learned(self, rows: Sequence[Example], with_prompts: bool = True) -> Tensor:
        """What the students say at the positions of the rows' answers, or the bare model without prompts.

        Returns:
            Log-probabilities, float32 `[positions, vocabulary]`.
        """
        return self._said(rows, [row.text_ids for row in rows], [row.task if with_prompts else None for row in rows])

    def remembered(self, rows: Sequence[Example]) -> Taught:
        """What the teachers say, as in `taught`; with `top_k`, of each row what they said the first time."""
        if self._top_k is None:
            return self.taught(rows)
        new = {_key(row): row for row in rows if _key(row) not in self._stored}
        if new:
            found = self.taught(list(new.values())).likeliest(self._top_k)
            assert found.tokens is not None
            lengths = [len(row.target_ids) for row in new.values()]
            parts = zip(found.log_probabilities.split(lengths), found.tokens.split(lengths), strict=True)
            # Validation runs in inference mode, whose tensors no later training step could use.
            with torch.inference_mode(False):
                kept = [Taught(values.cpu().clone(), tokens.cpu().clone()) for values, tokens in parts]
            self._stored.update(zip(new, kept, strict=True))
        known = [self._stored[_key(row)] for row in rows]
        values = torch.cat([each.log_probabilities for each in known])
        tokens = torch.cat([each.tokens for each in known if each.tokens is not None])
        return Taught(values.to(self._model.device), tokens.to(self._model.device))

    def answers(self, rows: Sequence[Example], by_students: bool = False) -> list[list[int]]:
        """What teachers, or their students, answer to rows: the likeliest label, or the greedy continuation.

        Raises:
            SoftPromptError: a row of a task without a teacher, or one that cannot be answered.
        """
        texts = [row.text_ids if by_students else self._text_ids(row) for row in rows]
        names = [row.task if by_students else self.teachers[row.task].name for row in rows]
        templates = {task: encoding.template for task, encoding in self._encodings.items()}
        templates |= {teacher.name: templates[task] for task, teacher in self.teachers.items()}
        found = TaskAnswers(self._model, self._tokenizer, templates).answer(texts, names, self._max_new_tokens)
        for index, reason in found.failures.items():
            text = self._tokenizer.decode(rows[index].text_ids)
            raise SoftPromptError(f"{names[index]!r} cannot answer the row {text!r:.200}: {reason}")
        answers = []
        for row, ids, ended in zip(rows, found.token_ids, found.finish_reasons, strict=True):
            # The last token of an answer is only predicted and never read, so any token may stand for the end.
            end = self._encodings[row.task].end_ids if ended == "label" else [self.pad] if ended == "stop" else []
            answers.append([*(ids or []), *end])
        return answers

    def said_in(self, row: Example) -> str:
        """What the columns of a row put into its template; of a row without columns, the text behind its teacher."""
        if row.columns is None:
            return self.words(self._text_ids(row))
        names = dict.fromkeys(columns_of(self._encodings[row.task].template.text))
        return " ".join(value_text(row.columns[name]) for name in names)

    def words(self, ids: Sequence[int]) -> str:
        """What these tokens say, without those that are no words."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _said(self, rows: Sequence[Example], texts: Sequence[list[int]], tasks: Sequence[str | None]) -> Tensor:
        return answer_log_probabilities(self._model, texts, [row.target_ids for row in rows], tasks, self.pad)

    def _text_ids(self, row: Example) -> list[int]:
        if row.task not in self.teachers:
            known = ", ".join(map(repr, self.teachers))
            raise SoftPromptError(f"rows of {row.task!r} have no teacher; there are teachers of: {known}")
        return self.teachers[row.task].text_ids(row.text_ids)


def _key(row: Example) -> _Key:
    return row.task, tuple(row.text_ids), tuple(row.target_ids)
