"""Turning requests into token ids, and finding out which of them cannot be answered and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.tokens import check_ids, encode_target, encode_text
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.ranking import stems
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.prompts.templates import TaskTemplate, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attached_prompts(model: PreTrainedModel) -> SoftPrompts:
    """The prompts that are attached to a model; a model without any raises a `SoftPromptError`."""
    attachment = attachment_of(model)
    if attachment is None:
        raise SoftPromptError("the model has no prompts; attach(model, prompts) first")
    return attachment.prompts


@dataclass(frozen=True)
class Request:
    """A request that can be answered.

    Attributes:
        index: the index of the request in its call.
        ids: the token ids of its text.
        task: its task; None means no prompt.
        length: the number of tokens of its prompt, its text and its longest possible answer or label.
        mend: what the user can do if the request is too long.
        labels: the token ids of the labels to rank; empty if an answer is generated.
        rows: the number of rows that it takes in a batch.
    """

    index: int
    ids: list[int]
    task: str | None
    length: int
    mend: str
    labels: tuple[list[int], ...] = ()
    rows: int = 1


class RequestReader:
    """Makes requests from the arguments of a call. Raises a `SoftPromptError` for a request that cannot be answered.

    Args:
        model: a causal LM.
        tokenizer: the model's tokenizer.
        prompts: the prompts that are attached to the model.
        templates: the templates of the tasks that have one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompts: SoftPrompts,
        templates: Mapping[str, TaskTemplate] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._vocabulary = vocabulary_size(model)
        self._positions = most_tokens(model)
        self._dtype = model.dtype
        self._fit: set[str | None] = {None}  # the tasks whose prompts were found to be finite
        self._labels: dict[str, list[int]] = {}  # ids by label, because most requests share their labels with others
        self._templates = dict(templates or {})  # the caller's may change while the call runs
        self._encodings: dict[str, TaskEncoding] = {}
        self._label_ids: dict[str, tuple[list[int], ...]] = {}  # of the tasks whose labels were found to be known

    def to_generate(
        self, index: int, text: object, task: str | None, max_new_tokens: int, argument: str = "max_new_tokens"
    ) -> Request:
        """A request to generate at most `max_new_tokens` tokens behind a text.

        `argument` is what the caller calls them; empty where the caller leaves them open.
        """
        mend = f"shorten the text or lower {argument}" if argument else "shorten the text"
        return self._request(index, text, task, mend, (), max_new_tokens, argument)

    def to_rank(self, index: int, text: object, task: str | None, labels: object) -> Request:
        """A request for the log-probability of each label behind a text."""
        if not isinstance(labels, list | tuple) or not labels:
            raise SoftPromptError(f"expected a list of one label or more, found {labels!r}")
        label_ids = tuple(self._label(label, number) for number, label in enumerate(labels))
        return self._request(index, text, task, "shorten the text, or rank fewer or shorter labels", label_ids)

    def to_answer(
        self, index: int, row: object, task: str | None, max_new_tokens: int, argument: str = "max_new_tokens"
    ) -> Request:
        """A request for the task's answer to a row: with labels where the task has some, else for free text.

        `argument` is as in `to_generate`.
        """
        self._check_task(task)
        encoding = self.encoding(task)
        if task is not None and encoding is not None and encoding.label_ids is not None:
            return self._to_classify(index, row, task, encoding)
        text = row if encoding is None else self._row_ids(row, encoding)
        if isinstance(text, Mapping):
            raise SoftPromptError(
                f"the row has columns, and the task {task!r} has no template to put them into; give the text itself, "
                f"or set prompts.templates[{task!r}]"
            )
        return self.to_generate(index, text, task, max_new_tokens, argument)

    def template(self, task: object) -> TaskTemplate | None:
        """The template of a task; None for a task without one."""
        return self._templates.get(task) if isinstance(task, str) else None

    def encoding(self, task: object) -> TaskEncoding | None:
        """How the rows of a task become token ids; None for a task without a template."""
        template = self.template(task)
        if not isinstance(task, str) or template is None:
            return None
        if task not in self._encodings:
            self._encodings[task] = TaskEncoding.of(self._tokenizer, task, template)
        return self._encodings[task]

    def _to_classify(self, index: int, row: object, task: str, encoding: TaskEncoding) -> Request:
        if task not in self._label_ids:
            for label, of_label in zip(encoding.template.labels or [], encoding.label_ids or [], strict=True):
                check_ids(of_label, self._vocabulary, f"the label {label!r} of the task {task!r}")
            self._label_ids[task] = tuple(encoding.label_ids or [])
        ids, labels = self._row_ids(row, encoding), self._label_ids[task]
        is_text = len(ids) >= max(map(len, labels))
        mend = "shorten the text" if is_text else "give the task shorter labels, or shorten the text"
        return self._request(index, ids, task, mend, labels)

    def _row_ids(self, row: object, encoding: TaskEncoding) -> list[int]:
        """The ids of a row in its task's template. Ids are those of a text that went through the template before."""
        if isinstance(row, list):
            return row
        if isinstance(row, str):
            columns = [*dict.fromkeys(columns_of(encoding.template.text))]
            if len(columns) != 1:
                raise SoftPromptError(
                    f"a text alone fills a template of one column, and {encoding.template.text!r} has {len(columns)}; "
                    f"give a dict of its columns"
                )
            row = {columns[0]: row}
        if not isinstance(row, Mapping):
            raise SoftPromptError(f"the row must be a text or a dict of columns, found {row!r}")
        try:
            return encoding.text_ids(row, "the row")
        except SoftPromptError:
            raise
        except Exception as error:  # a value of the row may be of any type, and writes itself
            raise SoftPromptError(
                f"the row {row!r:.200} cannot be put into the template {encoding.template.text!r} ({error})"
            ) from error

    def _check_task(self, task: object) -> None:
        if task is not None and not isinstance(task, str):
            raise SoftPromptError(f"the task must be a name, or None for no prompt, found {task!r}")
        if task not in self._fit:
            self._prompts.check_finite([task], self._dtype)
            self._fit.add(task)

    def _label(self, label: object, number: int) -> list[int]:
        known = self._labels.get(label) if isinstance(label, str) else None
        ids = known or self._ids(label, encode_target, f"labels[{number}]")
        if isinstance(label, str):
            self._labels[label] = ids
        return ids

    def _ids(self, given: object, encode: Callable[[Any, str], list[int]], what: str) -> list[int]:
        if not isinstance(given, str | list):
            raise SoftPromptError(f"{what} must be a string or a list of token ids, found {given!r}")
        if isinstance(given, list) and not all(isinstance(token, Integral) for token in given):
            raise SoftPromptError(f"{what} is a list, and token ids are whole numbers, found {given!r:.200}")
        try:
            ids = given if isinstance(given, list) else encode(self._tokenizer, given)
        except (TypeError, ValueError) as error:  # for example half a surrogate pair, which JSON may hold
            raise SoftPromptError(f"the tokenizer cannot read {given!r} ({error})") from error
        if not ids:
            raise SoftPromptError(f"{what} has no tokens; give it some words")
        check_ids(ids, self._vocabulary, what)
        return ids

    def _request(
        self,
        index: int,
        text: object,
        task: str | None,
        mend: str,
        labels: tuple[list[int], ...],
        max_new_tokens: int = 0,
        argument: str = "",
    ) -> Request:
        self._check_task(task)
        ids = self._ids(text, encode_text, "the text")
        prompt = 0 if task is None else len(self._prompts[task])
        behind = max(map(len, labels), default=max_new_tokens)
        length = prompt + len(ids) + behind
        if self._positions is not None and length > self._positions:
            of_answer = f"{argument}={behind}" if argument else f"{behind} of the answer"
            named = f"{behind} of the longest label" if labels else of_answer
            raise SoftPromptError(
                f"{prompt} tokens of prompt, {len(ids)} of text and {named} are more than the model's "
                f"{self._positions} positions; {mend}"
            )
        return Request(index, ids, task, length, mend, labels, max(len(stems(labels)), 1))


def most_tokens(model: PreTrainedModel) -> int | None:
    """The most tokens a row may have; None if the model's configuration sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found - ModelTraits.of(model).position_offset if isinstance(found, int) and found > 0 else None
