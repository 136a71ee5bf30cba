"""`TaskTemplate`: how a row of a data set becomes a text and its target."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.json_values import dumps
from lightning_softprompt.prompts.characters import has_control, shown

# The types that each field of a template may have, and their names in errors.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "a text"),
    "target": ((str,), "a text"),
    "labels": ((list, tuple, type(None)), "a list of texts or None"),
    "chat": ((bool,), "true or false"),
    "system": ((str, type(None)), "a text or None"),
    "end_token": ((bool, type(None)), "true, false or None"),
    "special_tokens": ((bool,), "true or false"),
}


@dataclass
class TaskTemplate:
    r"""How the rows of a task are written for the model.

    Args:
        text: the model's input; `{column}` stands for the value of that column of the row, as it stands in the file. A
            column's name may hold spaces, dots and other signs, but none of `{ } [ ] : !`. For a brace, write two.
        target: what the model is to write behind the text; `{column}` stands for the value of that column here, too.
            If the text ends in a word or a colon, start the target with a space, as most tokenizers expect.
        labels: the possible targets of a classification task, as `target` renders them; the answer is the likeliest of
            them. None means that the answer is free text, which is generated up to the end-of-text token.
        chat: whether to use the tokenizer's chat template: the text is what the user says, and the target is the
            assistant's answer, which then starts without a space. The prompt stands in front of the whole chat.
        system: what the system says in a chat; None leaves it to the chat template.
        end_token: whether the tokenizer's end-of-text token stands behind the targets. None means that it stands behind
            free text, and behind labels where the ids of one label begin those of another.
        special_tokens: whether the tokenizer reads its special and other added tokens, such as `<|im_end|>`, in the
            values of a row. If False, they stay text there; the template's own words may hold some in any case.

    Example:
        >>> template = TaskTemplate("{review}\nSentiment:", " {label}", labels=[" positive", " negative"])
        >>> template.render_text({"review": "Great.", "label": "positive"}, "reviews.jsonl, line 1")
        'Great.\nSentiment:'
    """

    text: str = "{text}"
    target: str = " {label}"
    labels: list[str] | None = None
    chat: bool = False
    system: str | None = None
    end_token: bool | None = None
    special_tokens: bool = False

    def render_text(self, row: Mapping[str, Any], where: str) -> str:
        """The text of a row, which is the model's input; `where` names the row in errors.

        Raises:
            SoftPromptError: a column of the template that is missing or empty, or columns without any text.
        """
        parts = parts_of(self.text, row, where)
        values = [words for words, is_value in parts if is_value]
        if values and not any(value.strip() for value in values):
            raise SoftPromptError(f"{where}: the text {self.text!r} is empty; every row needs one")
        return "".join(words for words, _ in parts)

    def render_target(self, row: Mapping[str, Any], where: str) -> str:
        """The target of a row; `where` names the row in errors.

        Raises:
            SoftPromptError: a missing column, an empty target, or a target that is not one of `labels`.
        """
        target = "".join(words for words, _ in parts_of(self.target, row, where))
        if not target.strip():
            raise SoftPromptError(f"{where}: the target {self.target!r} is empty; every row needs one")
        if self.labels is not None and target not in self.labels:
            expected = ", ".join(map(repr, self.labels))
            near = next((label for label in self.labels if label.strip() == target.strip()), None)
            hint = f"; {near!r} differs by space alone: write {target!r} in labels, or change the target"
            raise SoftPromptError(
                f"{where}: the target is {target!r}, the task's labels are {expected}{hint if near else ''}"
            )
        return target

    def has_target(self, row: Mapping[str, Any]) -> bool:
        """Whether all columns of the target are in a row, and hold something."""
        values = [row.get(name) for name in columns_of(self.target)]
        return all(value is not None and value_text(value).strip() for value in values)


def columns_of(template: str) -> list[str]:
    """The names of the columns that a template has fields for."""
    return [name for _, name in fields_of(template) if name is not None]


def parts_of(template: str, row: Mapping[str, Any], where: str) -> list[tuple[str, bool]]:
    """The words of a template and the values of a row in their order, each with whether it is a value.

    Raises:
        SoftPromptError: a column of the template that is missing, empty, nested too deep or of bytes; `where` names
            the row.

    Example:
        >>> parts_of("Stars: {stars}!", {"stars": 5}, "row 1")
        [('Stars: ', False), ('5', True), ('!', False)]
    """
    missing = [name for name in columns_of(template) if row.get(name) is None]
    if missing:
        raise SoftPromptError(
            f"{where}: the template {template!r} needs the column {missing[0]!r}, which is "
            f"{'empty' if missing[0] in row else 'missing'}; columns: {', '.join(map(repr, row))}"
        )
    parts = []
    for words, name in fields_of(template):
        parts.append((words, False))
        if name is not None:
            parts.append((_text_in(row, name, where), True))
    return parts


def _text_in(row: Mapping[str, Any], name: str, where: str) -> str:
    if isinstance(row[name], bytes):
        raise SoftPromptError(f"{where}: the column {name!r} holds bytes that are no text in UTF-8; write it as text")
    try:
        return value_text(row[name])
    except RecursionError as error:
        raise SoftPromptError(f"{where}: the column {name!r} is nested too deep; make it flat") from error


def value_text(value: Any) -> str:
    """A value of a row as its file says it: a text as it stands, and anything else as JSON writes it.

    Example:
        >>> value_text("3.10"), value_text(True), value_text(["a", 1])
        ('3.10', 'true', '["a", 1]')
    """
    if isinstance(value, str):
        return value
    return dumps(value) if isinstance(value, bool | dict | list) else f"{value}"


@lru_cache(maxsize=1024)
def fields_of(template: str) -> tuple[tuple[str, str | None], ...]:
    """The words of a template, each with the column that stands behind them; None at the end."""
    return tuple((words, name) for words, name, _, _ in string.Formatter().parse(template))


def check_templates(tasks: Mapping[str, TaskTemplate]) -> None:
    """Raise a `SoftPromptError` if one of the templates cannot be used."""
    for task, template in tasks.items():
        _check_types(task, template)
        for text in (template.text, template.target):
            _check_fields(task, text)
        if template.system is not None and not template.chat:
            raise SoftPromptError(f"task {task!r} has words of the system and is no chat; set chat to true")
        labels: Sequence[str] | None = template.labels
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise SoftPromptError(f"task {task!r}: labels must be at least two different texts, got {labels!r}")
        for text in (template.text, template.target, template.system or "", *(labels or ())):
            if has_control(text, allowed="\n\r\t"):
                raise SoftPromptError(
                    f"task {task!r}: of the control characters, templates may only hold newlines, carriage returns and "
                    f"tabs, got {text!r}"
                )


def _check_types(task: str, template: object) -> None:
    if not isinstance(template, TaskTemplate):
        raise SoftPromptError(f"the template of task {task!r} must be a TaskTemplate, got {shown(template)}")
    for name, (kinds, wanted) in _TYPES.items():
        value = getattr(template, name)
        if not isinstance(value, kinds):
            raise SoftPromptError(f"task {task!r}: {name!r} of the template must be {wanted}, got {shown(value)}")
    if not all(isinstance(label, str) for label in template.labels or ()):
        raise SoftPromptError(f"task {task!r}: the labels of the template must be texts, got {shown(template.labels)}")


def _check_fields(task: str, text: str) -> None:
    try:
        fields = [found[1:] for found in string.Formatter().parse(text) if found[1] is not None]
    except ValueError as error:
        raise SoftPromptError(
            f"task {task!r}: the template {text!r} has unbalanced braces ({error}); for a brace, write two"
        ) from error
    for name, spec, conversion in fields:
        # Other readers than this one may take a name behind a dot or in brackets for a part of the value.
        if not name or spec or conversion or any(sign in name for sign in ("[", "]", ".__")):
            found = f"{name}" + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise SoftPromptError(
                f"task {task!r}: the template {text!r} may only hold {{column}} fields, as {{text}}, found {{{found}}}"
                "; a value is written as it stands in the file, so leave out what stands behind : or !, give a column "
                "whose name holds one of { } [ ] : ! another name, and for braces themselves write {{ and }}"
            )
