"""Teachers: what stands in front of their rows, against what a chat template and a tokenizer write."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from lightning_softprompt import SoftPromptError, TaskTemplate
from lightning_softprompt.base.tokens import encode_chat, encode_target, encode_text
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.training.teachers import Teacher, system_of_student
from tests.tokenizer import word_tokenizer

WORDS = ["yes", "or", "no", "7", "of", "9", "sys", "usr", "end", "ans", "be", "brief", "kind", "helpful", "a", "film"]
WORDS += ["=>"]
SYSTEM = "be brief be kind"
TURNS = "{% for m in messages %}{{ {'system': 'sys', 'user': 'usr'}[m.role] }} {{ m.content }} end {% endfor %}ans"
DEFAULT = "{% if messages[0].role != 'system' %}sys helpful end {% endif %}" + TURNS
WITH_SYSTEM = "{% if messages[0].role == 'system' %}"
NO_SYSTEM = WITH_SYSTEM + "{{ raise_exception('no system here') }}{% endif %}" + TURNS
MERGED = "{{ messages[0].content }} usr {{ messages[1].content }} no"
OTHERWISE = WITH_SYSTEM + MERGED + "{% else %}" + TURNS + "{% endif %}"


def encoding_of(template: TaskTemplate, chats: str | None = None, starts: bool = False) -> TaskEncoding:
    tokenizer: Any = word_tokenizer(WORDS)
    tokenizer.chat_template = chats
    if starts:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    return TaskEncoding.of(tokenizer, "task", template)


@pytest.mark.parametrize("starts", [False, True])
def test_a_hard_prompt_stands_behind_the_start_token_and_in_front_of_the_text(starts: bool) -> None:
    encoding = encoding_of(TaskTemplate("{text} =>", " {label}"), starts=starts)
    teacher = Teacher.of("task", SYSTEM, encoding)
    student = encoding.text_ids({"text": "a film"}, "")
    whole = encode_text(encoding.tokenizer, f"{SYSTEM} a film =>")
    assert teacher.ids + teacher.text_ids(student) == whole and (whole[0] == 0) == starts
    assert teacher.head == ([0] if starts else []) and teacher.name == "task (teacher)"


@pytest.mark.parametrize("chats", [TURNS, DEFAULT])
@pytest.mark.parametrize("system", [None, "no"])
@pytest.mark.parametrize("text", ["a film", "yes or no", "7 of 9"])
def test_in_a_chat_it_is_what_the_system_says(chats: str, system: str | None, text: str) -> None:
    encoding = encoding_of(TaskTemplate("{text} =>", "{label}", chat=True, system=system), chats)
    teacher = Teacher.of("task", SYSTEM, encoding)
    student = encoding.text_ids({"text": text}, "")
    assert teacher.ids + teacher.text_ids(student) == encode_chat(encoding.tokenizer, f"{text} =>", SYSTEM)
    written = {None: [] if chats == TURNS else ["sys", "helpful"], "no": ["sys", "no"]}[system]
    assert encoding.tokenizer.convert_ids_to_tokens(teacher.head) == written


def test_what_it_puts_in_front_of_every_row_is_kept_whole() -> None:
    teacher = Teacher.of("task", SYSTEM, encoding_of(TaskTemplate(chat=True, target="{label}"), DEFAULT))
    tokenizer = word_tokenizer(WORDS)
    assert teacher.ids == encode_target(tokenizer, f"sys {SYSTEM}")


@pytest.mark.parametrize(
    ("text", "template", "chats", "message"),
    [
        (" \n", TaskTemplate(), None, "the teacher of 'task' must be a text that says what to do"),
        (SYSTEM, TaskTemplate(chat=True), None, "the tokenizer has no chat template"),
        (SYSTEM, TaskTemplate(chat=True), NO_SYSTEM, "takes no words of the system .no system here"),
        (SYSTEM, TaskTemplate(chat=True), OTHERWISE, "writes a message otherwise behind the words of the system"),
        (SYSTEM, TaskTemplate(chat=True, system=SYSTEM), TURNS, "leave `system` out of the template"),
    ],
)
def test_what_cannot_teach_is_refused(text: str, template: TaskTemplate, chats: str | None, message: str) -> None:
    with pytest.raises(SoftPromptError, match=message):
        Teacher.of("task", text, encoding_of(template, chats))


@pytest.mark.parametrize("row", [[9, 8], [1], [], [2, 1, 5]])
def test_a_row_that_begins_otherwise_is_refused(row: list[int]) -> None:
    with pytest.raises(SoftPromptError, match="its template begins rows with"):
        Teacher("task", [1, 5, 6], [1]).text_ids(row)


@pytest.mark.parametrize(
    ("chats", "system"),
    [
        (DEFAULT, ""),
        (TURNS, None),  # an empty turn of the system would only be longer
        (NO_SYSTEM, None),
        ("{{ messages[0].content or 'sys helpful' }} usr " + TURNS, None),  # it writes its own all the same
        (None, None),
    ],
)
def test_the_system_says_nothing_to_a_student_where_that_saves_tokens(chats: str | None, system: str | None) -> None:
    tokenizer: Any = word_tokenizer(WORDS)
    tokenizer.chat_template = chats
    assert system_of_student(tokenizer) == system
