"""What a client reads: OpenAI's types, which its own models take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.requests import AnswerRequest, ChatRequest, CompletionRequest
from lightning_softprompt.serving.responses import Reply, error_body, event, refusal
from lightning_softprompt.serving.rows import Part, Row, TextRow, Token
from tests.serving.helpers import prompts_of

TOKENS = [Token("é", -0.5, [("é", -0.5), ("x", -1.0), ("x", -2.0)], -1), Token("b", -0.25, [], 1)]
PARTS = [Part("éb", TOKENS, "stop"), Part("c", [], "length")]


def rows() -> list[Row]:
    made: list[Row] = [TextRow(Request(0, [6, 7], "tone", 9, ""), prompts_of({"tone": [5, 5, 5]}), print) for _ in "ab"]
    for row, count in zip(made, (2, 1), strict=True):
        row.completion_tokens = count
    return made


def reply(chat: bool = False, **options: Any) -> Reply:
    asked: AnswerRequest
    if chat:
        asked = ChatRequest(model="tone", messages=[{"role": "user", "content": "x"}], n=2, **options)
    else:
        asked = CompletionRequest(model="tone", prompt="x", n=2, **options)
    return Reply(asked, rows())


def test_a_whole_completion() -> None:
    found = Completion.model_validate_json(reply(logprobs=2).whole(PARTS))
    assert found.id.startswith("cmpl-") and (found.object, found.model) == ("text_completion", "tone")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in found.choices] == [
        (0, "éb", "stop"),
        (1, "c", "length"),
    ]
    told = found.choices[0].logprobs
    assert told is not None and told.tokens == ["é", "b"] and told.text_offset == [0, 1]
    assert told.token_logprobs == [-0.5, -0.25] and told.top_logprobs == [{"é": -0.5, "x": -1.0}, {}]
    assert found.usage is not None and found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3 + 2,
        "completion_tokens": 3,
        "total_tokens": 8,
    }


def test_a_whole_chat() -> None:
    found = ChatCompletion.model_validate_json(reply(chat=True, logprobs=True).whole(PARTS))
    assert found.id.startswith("chatcmpl-") and found.choices[0].message.content == "éb"
    assert found.choices[0].message.role == "assistant" and found.choices[1].finish_reason == "length"
    told = found.choices[0].logprobs
    assert told is not None and told.content is not None and told.content[0].bytes == [195, 169]
    assert [each.token for each in told.content[0].top_logprobs] == ["é", "x", "x"]


@pytest.mark.parametrize("chat", [False, True])
def test_nothing_is_told_that_was_not_asked_for(chat: bool) -> None:
    found = json.loads(reply(chat=chat).whole(PARTS))
    assert found["choices"][0]["logprobs"] is None
    chunk = json.loads(reply(chat=chat).chunk(1, PARTS[1]))
    assert chunk["choices"][0]["logprobs"] is None and "usage" not in chunk


def test_chunks_of_a_completion() -> None:
    this = reply(logprobs=1)
    first, last = (json.loads(this.chunk(0, part)) for part in (Part("é", TOKENS[:1]), Part("", [], "stop")))
    assert first["choices"][0]["finish_reason"] is None and first["choices"][0]["logprobs"]["tokens"] == ["é"]
    assert last["choices"][0]["finish_reason"] == "stop" and last["id"] == first["id"]
    assert this.first_chunks() == [] and json.loads(this.usage_chunk())["usage"]["total_tokens"] == 8
    assert json.loads(this.usage_chunk())["choices"] == []


def test_chunks_of_a_chat() -> None:
    this = reply(chat=True, logprobs=True)
    begun = [ChatCompletionChunk.model_validate_json(chunk) for chunk in this.first_chunks()]
    assert [chunk.choices[0].index for chunk in begun] == [0, 1] and begun[0].choices[0].delta.role == "assistant"
    chunk = ChatCompletionChunk.model_validate_json(this.chunk(1, Part("é", TOKENS[:1])))
    (choice,) = chunk.choices
    assert (choice.index, choice.delta.content, choice.finish_reason) == (1, "é", None)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    end = json.loads(this.chunk(0, Part("", [], "stop")))
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "stop"
    assert json.loads(this.usage_chunk())["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    "status, param, kind, code",
    [
        (400, "n", "invalid_request_error", None),
        (401, None, "authentication_error", "invalid_api_key"),
        (404, "model", "invalid_request_error", "model_not_found"),
        (404, None, "invalid_request_error", None),
        (413, None, "invalid_request_error", None),
        (429, None, "rate_limit_error", "queue_full"),
        (503, None, "server_error", None),
    ],
)
def test_errors_have_the_shape_of_openai(status: int, param: str | None, kind: str, code: str | None) -> None:
    expected = {"error": {"message": "so it is", "type": kind, "param": param, "code": code}}
    assert error_body(status, "so it is", param) == expected
    found = refusal(status, "so it is", param, {"retry-after": "1"})
    assert found.status_code == status and json.loads(found.body) == expected and found.headers["retry-after"] == "1"


def test_an_error_may_repeat_whatever_a_client_sent() -> None:
    assert json.loads(refusal(400, "there is no '\ud800'").body)["error"]["message"] == "there is no '\ud800'"


def test_an_event_is_one_line() -> None:
    this = reply()
    written = event(this.chunk(0, Part("a\n\nb\u2028c")))
    assert written.startswith("data: {") and written.endswith("\n\n") and written.count("\n") == 2
