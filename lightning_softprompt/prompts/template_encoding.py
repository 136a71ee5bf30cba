"""A task's template as token ids: the text of a row, its target, and the labels. Training and inference both use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from lightning_softprompt.base.guarded_text import encode_pieces, guarded, special_tokens, without_cuts
from lightning_softprompt.base.tokens import encode_chat, encode_target, encode_text, turns_of, write_turns
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates, columns_of, value_text


@dataclass(frozen=True)
class TaskEncoding:
    """How the rows of a task become token ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: the task's template.
        end_ids: what stands behind each target: the end-of-text token, or nothing.
        label_ids: the token ids of each label, with `end_ids` behind them. None of them begins another one. None for a
            task whose answers are free text.
        special: what finds the special tokens that stay text in the values of a row; None where there are none.

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
    special: re.Pattern[str] | None = None

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
        special = None if template.special_tokens else special_tokens(tokenizer)
        if template.labels is None:
            return cls(tokenizer, template, _end_ids(tokenizer, task, template, alike=None), None, special)
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
        return cls(tokenizer, template, end_ids, label_ids, special)

    def text_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The token ids of a row's text, in the tokenizer's chat template if the task has chats.

        Raises:
            SoftPromptError: a row that the template cannot use, or a text that the tokenizer cannot read; `where` names
                the row.
        """
        text = self.text_of(row, where)
        try:
            if self.template.chat:
                return encode_chat(self.tokenizer, text, self.template.system)
            return encode_pieces(text, partial(encode_text, self.tokenizer), partial(encode_target, self.tokenizer))
        except Exception as error:  # a tokenizer and its chat template are code of the base, and may raise anything
            told = " ".join(str(error).split())
            raise SoftPromptError(f"{where}: the tokenizer cannot read {without_cuts(text)!r:.200} ({told})") from error

    def text_of(self, row: Mapping[str, Any], where: str) -> str:
        """The text of a row, cut where a value would be read as a special token.

        Raises:
            SoftPromptError: a row that the template cannot use; `where` names the row.
        """
        return self.template.render_text(self._guarded(row, self.template.text), where)

    def _guarded(self, row: Mapping[str, Any], template: str) -> Mapping[str, Any]:
        if self.special is None:
            return row
        values = {name: row[name] for name in columns_of(template) if row.get(name) is not None}
        return {**row, **{name: guarded(value_text(value), self.special) for name, value in values.items()}}

    def target_ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The token ids of a row's target, with `end_ids` behind them.

        Raises:
            SoftPromptError: a row that the template cannot use; `where` names the row.
        """
        if self.template.labels is not None and self.label_ids is not None:
            target = self.template.render_target(row, where)
            return [*self.label_ids[self.template.labels.index(target)]]
        target = self.template.render_target(self._guarded(row, self.template.target), where)
        encode = partial(encode_target, self.tokenizer)
        return [*encode_pieces(target, encode, encode), *self.end_ids]


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
