"""Answers by the templates of the tasks: a row goes in, a label or a text comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.answers import NOT_FINITE, Answer, Answers, TextAnswers, Written
from lightning_softprompt.inference.batches import answer_in_batches, check_budget, in_batches, report, servable
from lightning_softprompt.inference.ranking import RankedRow, classify_labels
from lightning_softprompt.inference.requests import Request, RequestReader, attached_prompts
from lightning_softprompt.inference.writing import Writer
from lightning_softprompt.prompts.templates import TaskTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[str | Mapping[str, Any] | list[int]]


class TextStream(Iterator[tuple[int, str]]):
    """The index of a row and its text so far, again and again.

    Attributes:
        failures: why a row has no answer, by the index of the row. It grows while the stream is read, if memory runs
            out.
    """

    def __init__(self, texts: Iterator[tuple[int, str]], failures: dict[int, str]) -> None:
        self._texts: Any = texts
        self.failures = failures

    def __next__(self) -> tuple[int, str]:
        return next(self._texts)

    def close(self) -> None:
        """Stop the work; the stream is at its end then. A stream that nothing refers to any more is closed, too."""
        self._texts.close()


class TaskAnswers:
    """What `MixedTaskGenerator` and `CausalLMModule` answer by templates. Made for a call, so that nothing of it stays.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: the model's tokenizer.
        templates: the templates of the tasks that have one.
        max_batch_tokens: the most tokens a batch may have, pads included.

    Raises:
        SoftPromptError: a model without prompts, or a `max_batch_tokens` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        templates: Mapping[str, TaskTemplate],
        max_batch_tokens: int = 16_384,
    ) -> None:
        check_budget(max_batch_tokens)
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = attached_prompts(model)
        self._max_batch_tokens = max_batch_tokens
        self._reader = RequestReader(model, tokenizer, self._prompts, templates)

    def classify(self, rows: Rows, tasks: Sequence[str | None], show_progress: bool = False) -> Answers[Answer]:
        """The likeliest label of each row, and the probabilities of all; see `MixedTaskGenerator.classify`."""
        _check_lists(rows, tasks)
        self._check_labels(tasks)

        def run(batch: list[Request]) -> list[Answer | SoftPromptError]:
            found = self._labelled(batch)
            return [
                Answer(each.text, each.probabilities or {}) if isinstance(each, Written) else each for each in found
            ]

        read = partial(self._read, rows, tasks, 0)
        bar = "classifying" if show_progress else None
        return answer_in_batches(len(rows), read, run, self._max_batch_tokens, bar)

    def answer(
        self,
        rows: Rows,
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        show_progress: bool = False,
        **options: Any,
    ) -> TextAnswers:
        """The text of each row's answer; see `MixedTaskGenerator.answer`."""
        _check_lists(rows, tasks)
        writer = Writer(self._model, self._tokenizer, max_new_tokens, options)

        def run(batch: list[Request]) -> Sequence[Written | SoftPromptError]:
            return self._labelled(batch) if batch[0].labels else writer.write(batch)

        read = partial(self._read, rows, tasks, max_new_tokens)
        bar = "answering" if show_progress else None
        return TextAnswers.of(answer_in_batches(len(rows), read, run, self._max_batch_tokens, bar))

    def stream(self, rows: Rows, tasks: Sequence[str | None], max_new_tokens: int = 64, **options: Any) -> TextStream:
        """The text of each row's answer as it comes; see `MixedTaskGenerator.stream`."""
        _check_lists(rows, tasks)
        if options.get("streamer") is not None:
            raise SoftPromptError("stream has a streamer of its own; leave the streamer out, or call answer")
        writer = Writer(self._model, self._tokenizer, max_new_tokens, options)
        failures: dict[int, str] = {}
        pending = servable(len(rows), partial(self._read, rows, tasks, max_new_tokens), failures)

        def run(batch: list[Request]) -> Iterator[tuple[int, str]]:
            if not batch[0].labels:
                return writer.stream(batch)
            labelled = {request.index: each for request, each in zip(batch, self._labelled(batch), strict=True)}
            failures.update({index: str(each) for index, each in labelled.items() if isinstance(each, SoftPromptError)})
            return iter([(index, each.text.strip()) for index, each in labelled.items() if isinstance(each, Written)])

        def texts() -> Iterator[tuple[int, str]]:
            yield from in_batches(pending, run, self._max_batch_tokens, failures)
            report(failures, len(rows))

        return TextStream(texts(), failures)

    def _read(self, rows: Rows, tasks: Sequence[str | None], max_new_tokens: int, index: int) -> Request:
        return self._reader.to_answer(index, rows[index], tasks[index], max_new_tokens)

    def _check_labels(self, tasks: Sequence[str | None]) -> None:
        """Raise a `SoftPromptError` for a task without labels. An unknown task fails its own rows alone."""
        for task in dict.fromkeys(task for task in tasks if task is None or isinstance(task, str)):
            template = self._reader.template(task)
            if template is not None and template.labels is None:
                raise SoftPromptError(
                    f"classify gives the label of a row, and the answers of the task {task!r} are free text; call "
                    "answer(rows, tasks)"
                )
            if template is None and (task is None or task in self._prompts):
                raise SoftPromptError(
                    f"classify needs the labels of a task, and the task {task!r} has no template that says them; set "
                    f"prompts.templates[…] = TaskTemplate(…, labels=[…]), or call rank(texts, tasks, labels)"
                )

    def _labelled(self, batch: list[Request]) -> list[Written | SoftPromptError]:
        rows = [RankedRow(request.ids, request.task, request.labels) for request in batch]
        pad = pad_token_id(self._tokenizer, vocabulary_size(self._model))
        written: list[Written | SoftPromptError] = []
        for request, found in zip(batch, classify_labels(self._model, rows, pad), strict=True):
            encoding = self._reader.encoding(request.task)
            assert encoding is not None and encoding.template.labels is not None
            if not math.isfinite(sum(found)):
                written.append(SoftPromptError(NOT_FINITE))
                continue
            labels, best = encoding.template.labels, found.index(max(found))
            ids = request.labels[best][: len(request.labels[best]) - len(encoding.end_ids)]
            written.append(Written(labels[best], ids, "label", dict(zip(labels, found, strict=True))))
        return written


def _check_lists(rows: Rows, tasks: Sequence[str | None]) -> None:
    if isinstance(rows, str) or isinstance(tasks, str) or len(rows) != len(tasks):
        raise SoftPromptError("rows and tasks must be lists of equal length, one task a row")
