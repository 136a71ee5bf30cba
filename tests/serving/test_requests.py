"""What clients ask: inputs and messages, and arguments that are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lightning_softprompt import TaskTemplate
from lightning_softprompt.base import tokens
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.serving.requests import ChatRequest, CompletionRequest
from lightning_softprompt.serving.tasks import ServedTasks, TaskFolder
from tests import tiny
from tests.inference.tasks import TEMPLATES, words
from tests.serving.helpers import save

CHAT = TaskTemplate("w5 {text}", "{label}", chat=True, system="w9")
FREE = {**TEMPLATES, "chat": CHAT, "two": TaskTemplate("{first} {second}", "{label}", chat=True)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> ServedTasks:
    folder: Path = tmp_path_factory.mktemp("prompts")
    save(folder, {**{task: [5, 6] for task in FREE}, "raw": [7]}, FREE)
    return TaskFolder(tiny.tiny_model(), words(), folder, "base").current


def chat(*turns: tuple[str, Any], model: str = "base", **options: Any) -> ChatRequest:
    return ChatRequest(model=model, messages=[{"role": role, "content": said} for role, said in turns], **options)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("w6", ["w6"]),
        ({"text": "w6"}, [{"text": "w6"}]),
        ([6, 7], [[6, 7]]),
        (["w6", "w7"], ["w6", "w7"]),
        ([[6], [7, 8]], [[6], [7, 8]]),
        ([{"text": "w6"}], [{"text": "w6"}]),
    ],
)
def test_the_inputs_of_a_completion(prompt: Any, expected: list[Any], tasks: ServedTasks) -> None:
    assert CompletionRequest(model="base", prompt=prompt).inputs(tasks, words()) == expected


def test_an_empty_list_asks_for_nothing(tasks: ServedTasks) -> None:
    with pytest.raises(SoftPromptError, match="'prompt' is an empty list"):
        CompletionRequest(model="base", prompt=[]).inputs(tasks, words())


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize(
    "asked, expected",
    [
        (chat(("user", "w6")), "w6 w56 w57"),
        (
            chat(("developer", "w8"), ("user", "w6"), ("assistant", "w7"), ("user", "w6")),
            "w8 w55 w6 w56 w7 w56 w6 w56 w57",
        ),
        (chat(("user", [{"type": "text", "text": "w6 "}, {"type": "text", "text": "w7"}])), "w6 w7 w56 w57"),
        (chat(("user", "w6"), model="raw"), "w6 w56 w57"),
        (chat(("user", "w6"), model="chat"), "w9 w55 w5 w6 w56 w57"),
        (chat(("system", "w8"), ("user", "w6"), model="chat"), "w8 w55 w5 w6 w56 w57"),
        (
            chat(("user", "w6"), ("assistant", "w7"), ("user", "w8"), model="chat"),
            "w9 w55 w5 w6 w56 w7 w56 w5 w8 w56 w57",
        ),
    ],
)
def test_messages_become_a_chat_with_what_the_task_says(asked: ChatRequest, expected: str, tasks: ServedTasks) -> None:
    assert asked.inputs(tasks, words()) == [ids(expected)]


def test_a_task_of_single_texts_answers_one_message(tasks: ServedTasks) -> None:
    assert chat(("user", "w6 {w7}"), model="long").inputs(tasks, words()) == ["w6 {w7}"]
    for turns in ([("system", "w5"), ("user", "w6")], [("assistant", "w6")]):
        with pytest.raises(SoftPromptError, match="answers one message of a user; found the roles"):
            chat(*turns, model="long").inputs(tasks, words())


@pytest.mark.parametrize(
    "asked, said",
    [
        (chat(("tool", "w6")), "a message has the role 'tool'; roles are system, user and assistant"),
        (chat(("user", [{"type": "image_url"}])), "content of the type 'image_url'; give texts alone"),
        (chat(("user", "w6"), model="two"), "a message fills a template of one column.*has 2; ask /v1/completions"),
    ],
)
def test_messages_that_cannot_be_answered(asked: ChatRequest, said: str, tasks: ServedTasks) -> None:
    with pytest.raises(SoftPromptError, match=said):
        asked.inputs(tasks, words())


def test_what_a_chat_template_refuses_is_the_client_s_error(tasks: ServedTasks) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SoftPromptError, match=r"cannot take these messages.*roles must alternate"):
        chat(("user", "w6")).inputs(tasks, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(SoftPromptError, match="the tokenizer has no chat template"):
        chat(("user", "w6")).inputs(tasks, tokenizer)


@pytest.mark.parametrize(
    "name, value",
    [
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("best_of", 3),
        ("suffix", "x"),
    ],
)
def test_what_is_not_served_is_refused_by_name_and_what_asks_for_nothing_is_not(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not served here"):
        CompletionRequest(model="base", prompt="x", **{name: value})
    neutral = {"response_format": {"type": "text"}, "presence_penalty": 0, "logit_bias": {}, "tools": [], "best_of": 1}
    CompletionRequest(model="base", prompt="x", **{name: neutral.get(name)})


def test_how_much_is_asked_for() -> None:
    assert chat(("user", "x"), max_tokens=5).most_new_tokens == 5
    assert chat(("user", "x"), max_tokens=5, max_completion_tokens=7).most_new_tokens == 7
    assert chat(("user", "x")).alternatives is None
    assert chat(("user", "x"), logprobs=True, top_logprobs=3).alternatives == 3
    assert chat(("user", "x"), logprobs=True).alternatives == 0
    assert CompletionRequest(model="a", prompt="x", logprobs=0).alternatives == 0
    assert CompletionRequest(model="a", prompt="x", stream_options={"include_usage": True}).includes_usage
    assert not CompletionRequest(model="a", prompt="x").includes_usage


@pytest.mark.parametrize("model", ["base", "chat"])
def test_a_client_writes_no_special_tokens(tasks: ServedTasks, model: str) -> None:
    tokenizer = words()
    (name,) = [tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)]
    turns = [("user", "w6"), ("assistant", f"w7 {name}"), ("user", f"w8 {name} w9")]
    plain = [(role, said.replace(name, "w10")) for role, said in turns]
    (found,), (expected,) = (chat(*each, model=model).inputs(tasks, tokenizer) for each in (turns, plain))
    assert found.count(tokenizer.eos_token_id) == expected.count(tokenizer.eos_token_id)
    assert {6, 7, 8, 9} <= {*found} and len(found) > len(expected)


def test_names_of_tokens_are_few_calls_of_the_tokenizer(tasks: ServedTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = words()
    name = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    sizes, encode = [], tokens._encode_all

    def counted(*given: Any) -> dict[str, list[int]]:
        sizes.append(sum(map(len, given[1])))
        return encode(*given)

    monkeypatch.setattr(tokens, "_encode_all", counted)
    chat(("user", name * 10_000), model="base").inputs(tasks, tokenizer)
    assert 0 < len(sizes) <= 8 and sum(sizes) <= 6 * len(name * 10_000)
