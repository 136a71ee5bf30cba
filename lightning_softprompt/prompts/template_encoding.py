"""A task's template as token ids: the text of a row, its target, and the labels. Training and inference both use it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_softprompt.base.guarded_text import guarded, pieces_of, special_names, token_names, without_cuts
from lightning_softprompt.base.tokens import (
    encode_chat,
    encode_target,
    encode_text,
    ids_behind,
    turns_of,
    write_turns,
)
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates, parts_of


@dataclass(frozen=True)
class TaskEncoding:
    """How the rows of a task become token ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: the task's template.
        end_ids: what stands behind each target: the end-of-text token, or nothing.
        label_ids: the token ids of each label, with `end_ids` behind them. None of them begins another one. None for a
            task whose answers are free text.
        names: what finds the names of tokens that stay text where they touch a value of a row; None where none do.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<end>": 0, "stars": 1, ":": 2, "New": 3, "York": 4}))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        >>> template = TaskTemplate("{text} :", " {label}", labels=[" New", " New York"])
        >>> encoding = TaskEncoding.of(tokenizer, "city", template)
        >>> encoding.text_ids({"text": "stars"}, "row 1"), encoding.label_ids
        ([1, 2], [[3, 0], [3, 4, 0]])
    """

    tokenizer: Any
    template: TaskTemplate
    end_ids: list[int]
    label_ids: list[list[int]] | None
    names: re.Pattern[str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, task: str, template: TaskTemplate) -> TaskEncoding:
        """The encoding of a task; `task` names it in errors.

        Raises:
            SoftPromptError: a template that cannot be used; labels without tokens, of equal tokens, or of which one
                begins another where no end-of-text token stands behind them; a tokenizer without an end-of-text token
                where the template needs one; or a tokenizer whose chat template is missing, fails or leaves out what
                the system says.
        """
        check_templates({task: template})
        if template.chat:
            _check_chat(tokenizer, task, template.system)
        names = None if template.special_tokens else token_names(tokenizer)
        if template.labels is None:
            return cls(tokenizer, template, _end_ids(tokenizer, task, template, alike=None), None, names)
        ids = [encode_target(tokenizer, label) for label in template.labels]
        for label, found in zip(template.labels, ids, strict=True):
            if not found:
                raise SoftPromptError(f"task {task!r}: the label {label!r} has no tokens; give it a word")
        end_ids = _end_ids(tokenizer, task, template, _alike(task, template.labels, ids))
        label_ids = [[*label, *end_ids] for label in ids]
        alike = _alike(task, template.labels, label_ids)
        if alike is not None:
            raise SoftPromptError(
                f"task {task!r}: the tokens of the label {alike[0]!r}, with the end-of-text token, begin those of "
                f"{alike[1]!r}; leave the end-of-text token out of the labels"
            )
        return cls(tokenizer, template, end_ids, label_ids, names)

    def text_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The token ids of a row's text, in the tokenizer's chat template if the task has chats.

        Raises:
            SoftPromptError: a row that the template cannot use, or a text that the tokenizer cannot read; `where` names
                the row.
        """
        return self._ids(self.text_of(row, where), where, self._encode_text)

    def _encode_text(self, text: str) -> list[int]:
        if self.template.chat:
            return encode_chat(self.tokenizer, text, self.template.system, self.names)
        return encode_text(self.tokenizer, text)

    def text_of(self, row: Mapping[str, Any], where: str) -> str:
        """The text of a row, `guarded` where a value would be read as a token.

        Raises:
            SoftPromptError: a row that the template cannot use; `where` names the row.
        """
        self.template.render_text(row, where)  # checks it
        return guarded(parts_of(self.template.text, row, where), self.names)

    def pieces_of(self, value: str) -> list[tuple[str, int]]:
        """The pieces that a value is encoded in, each with its number of tokens.

        A name of a token that stays text has more tokens than one, so the tokens of a value are not spread evenly.
        """
        pieces = pieces_of(guarded([(value, True)], self.names))
        ids = ids_behind(self.tokenizer, {*pieces})
        return [(piece, len(ids[piece])) for piece in pieces]

    def target_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The token ids of a row's target, with `end_ids` behind them.

        Raises:
            SoftPromptError: a row that the template cannot use, or a target that the tokenizer cannot read; `where`
                names the row.
        """
        target = self.template.render_target(row, where)
        if self.template.labels is not None and self.label_ids is not None:
            return [*self.label_ids[self.template.labels.index(target)]]
        names = None if self.template.special_tokens else special_names(self.tokenizer)
        target = guarded(parts_of(self.template.target, row, where), names)
        return [*self._ids(target, where, lambda text: encode_target(self.tokenizer, text)), *self.end_ids]

    def _ids(self, text: str, where: str, encode: Callable[[str], list[int]]) -> list[int]:
        try:
            return encode(text)
        except Exception as error:  # a tokenizer and its chat template are code of the base, and may raise anything
            told = " ".join(str(error).split())
            raise SoftPromptError(f"{where}: the tokenizer cannot read {without_cuts(text)!r:.200} ({told})") from error


def _check_chat(tokenizer: Any, task: str, system: str | None) -> None:
    try:
        told = write_turns(tokenizer, turns_of("text", system))
        if system is not None and system.strip() not in told and told == write_turns(tokenizer, turns_of("text", None)):
            raise SoftPromptError(
                "the tokenizer's chat template leaves out what the system says; leave the system out, and write its "
                "words into the text of the template"
            )
    except SoftPromptError as error:
        raise SoftPromptError(f"task {task!r}: {error}") from error


def _end_ids(tokenizer: Any, task: str, template: TaskTemplate, alike: tuple[str, str] | None) -> list[int]:
    """What stands behind the targets. `alike` is a label whose tokens begin those of another one, with that one."""
    end = tokenizer.eos_token_id
    wanted = template.end_token
    if wanted is None:
        wanted = end is not None if template.labels is None else alike is not None
    if alike is not None and not (wanted and end is not None):
        found = "end_token is false" if not wanted else "the tokenizer has none"
        mend = "leave end_token out" if not wanted else "set tokenizer.eos_token"
        raise SoftPromptError(
            f"task {task!r}: the tokens of the label {alike[0]!r} begin those of {alike[1]!r}, so an end-of-text token "
            f"has to stand behind the labels to tell them apart, and {found}; {mend}, or write the labels otherwise"
        )
    if wanted and end is None:
        raise SoftPromptError(
            f"task {task!r}: end_token is true, and the tokenizer has no end-of-text token; set tokenizer.eos_token, "
            "or leave end_token out"
        )
    return [int(end)] if wanted else []


def _alike(task: str, labels: Sequence[str], ids: Sequence[Sequence[int]]) -> tuple[str, str] | None:
    """A label whose ids begin those of another one, and that other one; None if there is no such pair.

    Raises:
        SoftPromptError: labels of equal ids.
    """
    found = None
    # In the order of their ids, a label stands next to one that it begins, if it begins any.
    for (first, one), (second, other) in pairwise(sorted(zip(map(list, ids), labels, strict=True))):
        if first == second:
            raise SoftPromptError(
                f"task {task!r}: the tokenizer makes the same tokens of the labels {one!r} and {other!r}, so that no "
                "answer can tell them apart; write them otherwise, or take a tokenizer that knows their difference"
            )
        if found is None and second[: len(first)] == first:
            found = one, other
    return found
