"""Turning rows into token ids (examples), and examples into padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.base.padding import pad_left, padded_inputs
from lightning_softprompt.base.tokens import encode_chat, encode_target, encode_text
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.templates import TaskTemplate, columns_of


@dataclass(frozen=True)
class Example:
    """The token ids of one row's text and target."""

    task: str
    text_ids: list[int]
    target_ids: list[int]


@dataclass
class Encoder:
    """Turns rows into at most `max_length` token ids each. If a row is too long, its text is cut, never its target.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: the most tokens a row may have, text and target together.
    """

    tokenizer: Any
    max_length: int

    def _encode_text(self, template: TaskTemplate, row: Mapping[str, Any], where: str) -> list[int]:
        text = template.render_text(row, where)
        return (
            encode_chat(self.tokenizer, text, template.system) if template.chat else encode_text(self.tokenizer, text)
        )

    def _shortened(self, value: str, excess: int) -> str:
        """`value` without about `excess` tokens at its end, cut between two words if it has several."""
        count = len(encode_target(self.tokenizer, value))
        kept = min(len(value) * max(0, count - excess) // max(1, count), len(value) - 1)
        cut = value[:kept]
        words = cut.rstrip().rsplit(None, 1)
        inside_a_word = cut and not cut[-1].isspace() and not value[kept].isspace()
        return words[0] if inside_a_word and len(words) == 2 else cut.rstrip()

    def encode(
        self, template: TaskTemplate, row: Mapping[str, Any], where: str, with_target: bool = True
    ) -> tuple[list[int], list[int]]:
        """The token ids of a row's text and of its target.

        A target of free text ends with the end-of-text token, so that the model learns to stop. A label does not,
        because labels are ranked: the end-of-text token would only add to the loss.

        If a row is too long, the end of its longest column is cut. The template's own words and the target stay whole.

        Args:
            template: the template of the row's task.
            row: the row's columns.
            where: the name of the row in errors.
            with_target: whether to encode the target; if False, the target's ids are empty.

        Raises:
            SoftPromptError: a row that the template cannot use, a text without tokens, or a `max_length` that has no
                room for the target and the template's own words.
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
            longest = max(columns_of(template.text), key=lambda name: len(str(row[name])), default=None)
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
    if examples[0].target_ids:
        scored = [[-100] * len(example.text_ids) + example.target_ids for example in examples]
        batch["labels"] = pad_left(scored, -100)
    return batch
