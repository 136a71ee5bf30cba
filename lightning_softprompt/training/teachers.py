"""Teachers: hard prompts as tasks beside the soft prompts that are distilled from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lightning_softprompt.base.tokens import encode_alone, encode_chat, encode_text
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.template_encoding import TaskEncoding

# Two messages that begin and end otherwise, to find out what a chat template writes around a message.
_MESSAGES = ("yes or no", "7 of 9")


@dataclass(frozen=True)
class Teacher:
    """A hard prompt, and how the rows of its student's task stand behind it.

    The student's rows are those that it will be served with: the task's template, without the hard prompt. The
    teacher's rows are what is sent today. Both end alike, so that an answer has the same tokens behind both.

    Attributes:
        task: the task of the student.
        ids: what stands in front of every row of the teacher: a start token, if there is one, and the hard prompt.
        head: what stands in front of every row of the student, and gives way to `ids`: a start token, or what a chat
            template writes where the system says nothing.

    Example:
        >>> teacher = Teacher("support", ids=[1, 50, 51, 52], head=[1])
        >>> teacher.text_ids([1, 7, 8])
        [7, 8]
    """

    task: str
    ids: list[int]
    head: list[int]

    @property
    def name(self) -> str:
        """The teacher's own task, beside that of its student."""
        return f"{self.task} (teacher)"

    @classmethod
    def of(cls, task: str, text: str, encoding: TaskEncoding) -> Teacher:
        """The teacher of a task: `text` stands in front of its rows, or is what the system says in its chats.

        Raises:
            SoftPromptError: an empty text, a student that keeps the text, or a chat template that takes no words of the
                system or writes a message otherwise behind them.
        """
        if not isinstance(text, str) or not text.strip():
            raise SoftPromptError(f"the teacher of {task!r} must be a text that says what to do, got {text!r}")
        if not encoding.template.chat:
            head = _start_ids(encoding.tokenizer)
            return cls(task, [*head, *encode_alone(encoding.tokenizer, text)], head)
        if encoding.template.system == text:
            raise SoftPromptError(
                f"the chats of {task!r} have the teacher's text as words of the system, so that its student would be "
                "served with them; leave `system` out of the template"
            )
        return cls(task, *_around_messages(task, text, encoding))

    def text_ids(self, student: Sequence[int]) -> list[int]:
        """The row that the teacher gets for a row of its student.

        Raises:
            SoftPromptError: a row that does not begin as rows of the task do, or holds nothing else.
        """
        count = len(self.head)
        if list(student[:count]) != self.head or len(student) == count:
            raise SoftPromptError(
                f"a row of {self.task!r} begins with the tokens {list(student[: count + 1])}, and its template begins "
                f"rows with {self.head}; encode it with the template of the task"
            )
        return list(student[count:])


def system_of_student(tokenizer: Any) -> str | None:
    """What the system says in the chats of a student, whose teacher is what it says today: nothing, if that can be had.

    Returns:
        An empty text where the chat template then leaves out words of its own; None leaves them to the chat template.
    """
    (message, *_) = _MESSAGES
    try:
        is_shorter = len(encode_chat(tokenizer, message, "")) < len(encode_chat(tokenizer, message))
    except SoftPromptError:  # it takes no words of the system
        return None
    return "" if is_shorter else None


def _start_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer writes in front of any text."""
    (message, *_) = _MESSAGES
    whole = encode_text(tokenizer, message)
    return whole[: len(whole) - len(encode_alone(tokenizer, message))]


def _around_messages(task: str, text: str, encoding: TaskEncoding) -> tuple[list[int], list[int]]:
    """What a chat begins with where the system says `text`, and with the template's own words of the system."""
    try:
        with_text = [encode_chat(encoding.tokenizer, message, text) for message in _MESSAGES]
    except SoftPromptError as error:
        raise SoftPromptError(
            f"{error}; or put the teacher of {task!r} and its texts into a template without chat"
        ) from error
    without = [encode_chat(encoding.tokenizer, message, encoding.template.system) for message in _MESSAGES]
    long, short = _common(*with_text), _common(*without)
    if [ids[len(long) :] for ids in with_text] != [ids[len(short) :] for ids in without]:
        raise SoftPromptError(
            f"the chat template writes a message otherwise behind the words of the system, so that the teacher of "
            f"{task!r} and its student have no answer in common; use a template without chat"
        )
    # What both write directly in front of a message belongs to the row: with it, the message's first token may become
    # another one.
    shared = len(_common(long[::-1], short[::-1]))
    return long[: len(long) - shared], short[: len(short) - shared]


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """What two lists begin with alike."""
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
