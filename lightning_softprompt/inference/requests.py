"""Turning requests into token ids, and finding out which of them cannot be answered and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.tokens import check_ids, encode_target, encode_text
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.ranking import stems
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: SoftPrompts) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._lengths: dict[str | None, int] = {None: 0, **dict(zip(prompts.tasks, prompts.lengths, strict=True))}
        self._vocabulary = vocabulary_size(model)
        self._positions = _positions(model)
        self._dtype = model.dtype
        self._fit: set[str | None] = {None}  # the tasks whose prompts were found to be finite
        self._labels: dict[str, list[int]] = {}  # ids by label, because most requests share their labels with others

    def to_generate(self, index: int, text: object, task: str | None, max_new_tokens: int) -> Request:
        """A request to generate at most `max_new_tokens` tokens behind a text."""
        ids, mend = self._text(text, task), "shorten the text or lower max_new_tokens"
        length = self._length(ids, task, max_new_tokens, f"max_new_tokens={max_new_tokens}", mend)
        return Request(index, ids, task, length, mend)

    def to_rank(self, index: int, text: object, task: str | None, labels: object) -> Request:
        """A request for the log-probability of each label behind a text."""
        ids, mend = self._text(text, task), "shorten the text, or rank fewer or shorter labels"
        if not isinstance(labels, list | tuple) or not labels:
            raise SoftPromptError(f"expected a list of one label or more, found {labels!r}")
        label_ids = tuple(self._label(label, number) for number, label in enumerate(labels))
        longest = max(map(len, label_ids))
        length = self._length(ids, task, longest, f"{longest} of the longest label", mend)
        return Request(index, ids, task, length, mend, label_ids, len(stems(label_ids)))

    def _text(self, text: object, task: str | None) -> list[int]:
        if task not in self._fit:
            self._prompts.check_finite([int(self._prompts.task_ids([task])[0])], self._dtype)
            self._fit.add(task)
        return self._ids(text, encode_text, "the text")

    def _label(self, label: object, number: int) -> list[int]:
        known = self._labels.get(label) if isinstance(label, str) else None
        ids = known or self._ids(label, encode_target, f"labels[{number}]")
        if isinstance(label, str):
            self._labels[label] = ids
        return ids

    def _ids(self, given: object, encode: Callable[[Any, str], list[int]], what: str) -> list[int]:
        if not isinstance(given, str | list):
            raise SoftPromptError(f"{what} must be a string or a list of token ids, found {given!r}")
        try:
            ids = given if isinstance(given, list) else encode(self._tokenizer, given)
        except (TypeError, ValueError) as error:  # for example half a surrogate pair, which JSON may hold
            raise SoftPromptError(f"the tokenizer cannot read {given!r} ({error})") from error
        if not ids:
            raise SoftPromptError(f"{what} has no tokens; give it some words")
        check_ids(ids, self._vocabulary, what)
        return ids

    def _length(self, ids: Sequence[int], task: str | None, behind: int, named: str, mend: str) -> int:
        length = self._lengths[task] + len(ids) + behind
        if self._positions is not None and length > self._positions:
            raise SoftPromptError(
                f"{self._lengths[task]} tokens of prompt, {len(ids)} of text and {named} are more than the model's "
                f"{self._positions} positions; {mend}"
            )
        return length


def _positions(model: PreTrainedModel) -> int | None:
    """The most tokens a row may have; None if the model's configuration sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found - ModelTraits.of(model).position_offset if isinstance(found, int) and found > 0 else None
