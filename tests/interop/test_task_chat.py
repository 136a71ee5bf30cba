"""A chat template with `task=`, rendered as transformers renders it."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

from lightning_softprompt import TaskTemplate
from lightning_softprompt.interop.task_chat import TaskText, chat_template
from tests.interop.bases import ODD, WORDS
from tests.tokenizer import word_tokenizer

BASE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
BASE += "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "raw": None,
    ODD: TaskTemplate("{x}{{}}\n{x} =>", " {label}"),
    "fixed": TaskTemplate("say it", " {label}"),
    "chat": TaskTemplate("say {x}", "{y}", chat=True, system='be "kind"\n'),
    "silent": TaskTemplate("{x}", "{y}", chat=True, system=""),
    "two": TaskTemplate("{a} {b}", " {label}"),
}
CHAT = [{"role": "user", "content": "hi"}]


def render(base: str | None, messages: list[dict[str, str]] = CHAT, **options) -> str:
    tokenizer = word_tokenizer(WORDS)
    tasks = {task: TaskText("<P><s>", "<P>", template) for task, template in TEMPLATES.items()}
    tokenizer.chat_template = chat_template(base, tasks)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("raw", "<P>[user]hi\n[assistant]"),
        (ODD, "<P><s>hi{}\nhi =>"),
        ("fixed", "<P><s>say it"),
        ("chat", '<P>[system]be "kind"\n\n[user]say hi\n[assistant]'),
        ("silent", "<P>[system]\n[user]hi\n[assistant]"),
        (None, "[user]hi\n[assistant]"),
    ],
)
def test_a_task_is_written_as_it_was_trained(task: str | None, expected: str) -> None:
    assert render(BASE, task=task, add_generation_prompt=True) == expected


def test_a_longer_chat_and_words_of_the_system_stay() -> None:
    longer = [{"role": "system", "content": "mine"}, *CHAT, {"role": "assistant", "content": "yes"}, *CHAT]
    expected = "<P>[system]mine\n[user]hi\n[assistant]yes\n[user]say hi\n"
    assert render(BASE, longer, task="chat") == expected
    assert render(BASE, longer, task=ODD) == "<P><s>hi{}\nhi =>"


@pytest.mark.parametrize(
    "base", [BASE, " a\n\n  ", "\n  {% if true %}x{% endif %}\n", "  {{ 'y' }}", "{{- 'z' -}}\n \n"]
)
def test_without_a_task_nothing_changes(base: str) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = base
    assert render(base) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_without_a_template_of_the_base_tasks_that_need_none_are_there() -> None:
    assert render(None, task="raw") == "<P><s>hi" and render(None, task=ODD) == "<P><s>hi{}\nhi =>"
    for options in ({}, {"task": "chat"}):
        with pytest.raises(TemplateError, match="no chat template"):
            render(None, **options)


@pytest.mark.parametrize(("task", "message"), [("gone", "there is no task gone"), ("two", "has several columns")])
def test_what_cannot_be_written_is_an_error(task: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(BASE, task=task)
