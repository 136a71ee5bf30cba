"""How a row of a data set becomes text and target, and how these become token ids."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.base.tokens import encode_chat, encode_target, encode_text
from lightning_softprompt.errors import SoftPromptError


@dataclass
class TaskTemplate:
    r"""What the rows of a task look like to the model.

    Args:
        text: the model's input; `{column}` stands for a column of the row.
        target: what the model is to write behind it, likewise. Start it with a space where the text ends in a word
            or a colon, as most tokenizers expect.
        labels: the targets of a classification task, as `target` renders them: the answer is the likeliest of them.
            None for tasks of free text, which is generated up to the end-of-text token.
        chat: the text is what a user says, and the target the assistant's answer, in the tokenizer's chat template.
            Start the target without a space then. The soft prompt stands in front of all of it.
        system: what the system says in a chat; None: what the chat template has.

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

    def render_text(self, row: Mapping[str, Any], where: str) -> str:
        """The input of a row; `where` names the row in errors."""
        return _render(self.text, row, where)

    def render_target(self, row: Mapping[str, Any], where: str) -> str:
        """The target of a row, one of `labels` where there are any."""
        target = _render(self.target, row, where)
        if not target.strip():
            raise SoftPromptError(f"{where}: the target {self.target!r} is empty; every row needs one")
        if self.labels is not None and target not in self.labels:
            expected = ", ".join(map(repr, self.labels))
            raise SoftPromptError(f"{where}: the target is {target!r}, the task's labels are {expected}")
        return target


@dataclass
class Encoder:
    """Turns rows into token ids of at most `max_length`, never at the target's expense.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of a row, text and target together.
    """

    tokenizer: Any
    max_length: int

    def _encode_text(self, template: TaskTemplate, row: Mapping[str, Any], where: str) -> list[int]:
        text = template.render_text(row, where)
        return (
            encode_chat(self.tokenizer, text, template.system) if template.chat else encode_text(self.tokenizer, text)
        )

    def _shortened(self, value: str, excess: int) -> str:
        """`value` without about `excess` tokens at its end, cut between words where there are any."""
        count = len(encode_target(self.tokenizer, value))
        kept = min(len(value) * max(0, count - excess) // max(1, count), len(value) - 1)
        cut = value[:kept]
        words = cut.rstrip().rsplit(None, 1)
        inside_a_word = cut and not cut[-1].isspace() and not value[kept].isspace()
        return words[0] if inside_a_word and len(words) == 2 else cut.rstrip()

    def encode(
        self, template: TaskTemplate, row: Mapping[str, Any], where: str, with_target: bool = True
    ) -> tuple[list[int], list[int]]:
        """Text ids and target ids of a row.

        A free text ends with the end-of-text token, so that generation learns to stop. A label does not: it is ranked,
        and the token behind it would only take its share of the loss.

        A row that is too long loses the end of its longest column: the words that the template puts around it, and the
        target, stay whole.
        """
        target: list[int] = []
        if with_target:
            target = encode_target(self.tokenizer, template.render_target(row, where))
            if template.labels is None and self.tokenizer.eos_token_id is not None:
                target.append(self.tokenizer.eos_token_id)
        room = self.max_length - len(target)
        text = self._encode_text(template, row, where)
        row = dict(row)
        while len(text) > room:
            longest = max(_columns(template.text), key=lambda name: len(str(row[name])), default=None)
            if longest is None or not row[longest]:
                raise SoftPromptError(
                    f"{where}: max_length={self.max_length} has no room for the template and a target of "
                    f"{len(target)} tokens; raise it"
                )
            row[longest] = self._shortened(str(row[longest]), excess=len(text) - room)
            text = self._encode_text(template, row, where)
        if not text:
            raise SoftPromptError(f"{where}: the text {template.text!r} is empty; every row needs at least one token")
        return text, target


def _columns(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _render(template: str, row: Mapping[str, Any], where: str) -> str:
    missing = [name for name in _columns(template) if row.get(name) is None]
    if missing:
        raise SoftPromptError(
            f"{where}: the template {template!r} needs the column {missing[0]!r}, which is "
            f"{'empty' if missing[0] in row else 'missing'}; columns: {', '.join(map(repr, row))}"
        )
    return template.format_map(row)


def check_templates(tasks: Mapping[str, TaskTemplate]) -> None:
    """Raise a `SoftPromptError` where a template cannot be used."""
    for task, template in tasks.items():
        for text in (template.text, template.target):
            try:
                names = _columns(text)
            except ValueError as error:
                raise SoftPromptError(
                    f"task {task!r}: the template {text!r} has unbalanced braces ({error})"
                ) from error
            if any(not name.isidentifier() for name in names):
                raise SoftPromptError(f"task {task!r}: {text!r} may only hold {{column}} fields, as {{text}}")
        if template.system is not None and not template.chat:
            raise SoftPromptError(f"task {task!r} has words of the system and is no chat; set chat to true")
        labels: Sequence[str] | None = template.labels
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise SoftPromptError(f"task {task!r}: labels must be at least two different texts, got {labels!r}")
