"""Bodies of requests: their limit, and what is wrong with them in a line."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.requests import Request

from lightning_softprompt.serving.bodies import parse_body, read_body
from lightning_softprompt.serving.requests import ChatRequest, CompletionRequest


def read(chunks: list[bytes], most: int) -> tuple[bytes | None, int]:
    """The body, and how many chunks were taken."""
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    return asyncio.run(read_body(request, most)), taken


def test_a_body_is_read_up_to_its_limit() -> None:
    assert read([b"ab", b"cd", b""], 4) == (b"abcd", 3)
    assert read([b"ab", b"cd", b"e"], 4) == (None, 3)


def test_what_is_too_large_is_read_to_its_end_for_a_while() -> None:
    assert read([b"x" * 10] * 20, 10) == (None, 20)
    chunk = b"x" * 2**20  # one and the same, a thousand times
    body, taken = read([chunk] * 1000, 10)
    assert body is None and taken == 257


@pytest.mark.parametrize(
    "body, said, param",
    [
        (b"", "the body is not JSON (Expecting value", None),
        (b'{"model": "a"', "the body is not JSON", None),
        (b"\xff\xfe\xfa", "the body is not JSON", None),
        (b"[" * 200_000, "the body is not JSON (maximum recursion", None),
        (b"[1]", "the body must be a JSON object", None),
        (b"{}", "the argument 'model' is missing", "model"),
        (b'{"model": "a"}', "the argument 'prompt' is missing", "prompt"),
        (b'{"model": 5, "prompt": "x"}', "'model': Input should be a valid string", "model"),
        (b'{"model": "a", "prompt": 5}', "'prompt' must be a text, an object with the columns", "prompt"),
        (b'{"model": "a", "prompt": [true]}', "'prompt' must be a text", "prompt"),
        (b'{"model": "a", "prompt": [-1]}', "'prompt' must be a text", "prompt"),
        (b'{"model": "a", "prompt": "x", "stop": ""}', "'stop' must be a text that is not empty", "stop"),
        (b'{"model": "a", "prompt": "x", "n": 1000}', "'n': Input should be less than or equal to 128", "n"),
        (
            b'{"model": "a", "prompt": "x", "max_tokens": "5"}',
            "'max_tokens': Input should be a valid integer",
            "max_tokens",
        ),
        (b'{"model": "a", "prompt": "x", "temperature": NaN}', "'temperature': Input should be", "temperature"),
        (b'{"model": "a", "prompt": "x", "top_p": -0.1}', "'top_p': Input should be", "top_p"),
        (b'{"model": "a", "prompt": "x", "logprobs": true}', "'logprobs': Input should be a valid integer", "logprobs"),
        (b'{"model": "a", "prompt": "x", "echo": true}', "'echo' is not served here; leave it out", "echo"),
        (b'{"model": "a", "prompt": "x", "temprature": 0}', "there is no argument 'temprature'", "temprature"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(body: bytes, said: str, param: str | None) -> None:
    found = parse_body(body, CompletionRequest)
    assert isinstance(found, tuple)
    assert found[0].startswith(said) and found[1] == param and "\n" not in found[0] and len(found[0]) < 300


@pytest.mark.parametrize("element", [1.5, None, [1.5], [[]], {"a": 1}, "x", 1])
@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_of_a_long_list_one_wrong_element_is_noted(kind: type[Any], element: Any) -> None:
    many = [element] * 500 + [object()]
    chat = {"messages": [{"role": "user", "content": many}]}
    for content in ({"prompt": many},) if kind is CompletionRequest else (chat, {"messages": many}):
        with pytest.raises(ValidationError) as error:
            kind.model_validate({"model": "a", **content})
        assert error.value.error_count() < 10


def test_an_argument_that_is_missing_inside_of_another_is_named() -> None:
    body = b'{"model": "a", "messages": [{"role": "user", "content": "x"}, {"role": "user"}]}'
    assert parse_body(body, ChatRequest) == ("the argument 'messages.1.content' is missing", "messages")


def test_what_is_null_asks_for_nothing() -> None:
    names = ("audio", "prediction", "reasoning_effort", "logit_bias", "tools", "no_argument")
    found = parse_body(json.dumps({"model": "a", "prompt": "x", **dict.fromkeys(names)}).encode(), CompletionRequest)
    assert isinstance(found, CompletionRequest)


def test_likeliest_tokens_are_told_with_log_probabilities_alone() -> None:
    asked = {"model": "a", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    for more in ({}, {"logprobs": False}, {"logprobs": None}):
        found = parse_body(json.dumps({**asked, **more}).encode(), ChatRequest)
        assert found == ("'top_logprobs' are told with 'logprobs' alone; set 'logprobs' to true", "top_logprobs")
    for more in ({"logprobs": True}, {"top_logprobs": 0}, {"top_logprobs": None}):
        assert isinstance(parse_body(json.dumps({**asked, **more}).encode(), ChatRequest), ChatRequest)


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "user"}], [{"content": "x"}], [5]])
def test_messages_that_are_none(messages: Any) -> None:
    body = json.dumps({"model": "a", "messages": messages}).encode()
    found = parse_body(body, ChatRequest)
    assert isinstance(found, tuple) and found[1] == "messages" and "messages" in found[0]


def test_what_is_right_is_taken() -> None:
    body = b'{"model": "a", "prompt": ["x", "y"], "temperature": 1, "max_tokens": null, "user": "me", "best_of": 1}'
    found = parse_body(body, CompletionRequest)
    assert isinstance(found, CompletionRequest) and found.prompt == ["x", "y"] and found.temperature == 1.0
