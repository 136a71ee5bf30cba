"""The API as OpenAI's own client sees it, on loopback."""

from __future__ import annotations

import json
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lightning_softprompt import MixedTaskGenerator, TaskTemplate, attach
from lightning_softprompt.serving.admission import Limits
from tests import tiny
from tests.inference.tasks import HARD, ROWS, TEMPLATES, words
from tests.serving.helpers import Running, alone, prompts_of, save, serving, wait

FREE = TaskTemplate("w5 {text} w6", " {label}", chat=True, system="w9")
ALL = {**HARD, "chat": [44, 45]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prompts")
    save(folder, ALL, {**TEMPLATES, "chat": FREE})
    return folder


@pytest.fixture(scope="module")
def served(prompts: Path) -> Iterator[Running]:
    with serving(prompts, max_body_bytes=2**20, limits=Limits(max_queue=40)) as running:
        yield running


def call(
    served: Running, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any, Any]:
    """Status, body and headers, by hand."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(served.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def test_models_are_the_base_and_the_tasks(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", *ALL]
    found = client.models.retrieve("long")
    assert (found.object, found.owned_by) == ("model", "lightning-softprompt") and found.created > 1e9
    assert found.model_extra == {"parent": "base"}
    with pytest.raises(openai.NotFoundError, match="there is no model 'nope'; models: 'base', 'long'"):
        client.models.retrieve("nope")


def test_bare_texts_are_answered_as_the_tasks_were_trained(served: Running) -> None:
    model = tiny.tiny_model()
    loaded = prompts_of(HARD, model)
    loaded.templates.update(TEMPLATES)
    rows, tasks = [row for row, *_ in ROWS], [task for _, task, _ in ROWS]
    generator = MixedTaskGenerator(attach(model, loaded), words())
    expected = generator.answer(rows, tasks, max_new_tokens=6)
    client = served.client()
    for row, task, answer in zip(rows, tasks, expected, strict=True):
        found = client.completions.create(model=task or "base", prompt=row, max_tokens=6, temperature=0)
        assert found.choices[0].text.strip() == answer
        assert found.usage is not None and found.model == (task or "base")


def test_a_classification_answers_its_label_with_the_probabilities_of_all(served: Running) -> None:
    model = tiny.tiny_model()
    loaded = prompts_of(HARD, model)
    loaded.templates.update(TEMPLATES)
    generator = MixedTaskGenerator(attach(model, loaded), words())
    (expected,) = generator.classify(["w30 w31"], ["long"])
    client = served.client()
    found = client.completions.create(model="long", prompt="w30 w31", logprobs=1).choices[0]
    assert found.text == expected.label.strip() and found.finish_reason == "stop"
    assert found.logprobs is not None and found.logprobs.top_logprobs is not None
    shares = {label: math.exp(score) for label, score in found.logprobs.top_logprobs[0].items()}
    by_label = {label.strip(): share for label, share in expected.probabilities.items()}
    assert shares == pytest.approx(by_label, rel=1e-4) and len(shares) == 4
    messages = [{"role": "user", "content": "w30 w31"}]
    chat = client.chat.completions.create(model="long", messages=messages, logprobs=True).choices[0]
    assert chat.message.content == found.text and chat.logprobs is not None and chat.logprobs.content is not None
    assert {top.token for top in chat.logprobs.content[0].top_logprobs} == set(by_label)
    parts = [*client.completions.create(model="long", prompt="w30 w31", stream=True)]
    assert [part.choices[0].text for part in parts] == [found.text]


def greedy(task: str | None, text: list[int], new: int) -> str:
    ids, _ = alone(tiny.tiny_model(), ALL[task] if task else [], text, new)
    ids = ids[: ids.index(2)] if 2 in ids else ids
    return str(words().decode(ids, skip_special_tokens=True))


def test_chats_of_the_base_and_of_a_task(served: Running) -> None:
    client = served.client()
    messages = [{"role": "user", "content": "w30"}]
    for task, text in ((None, [30, 56, 57]), ("chat", [9, 55, 5, 30, 6, 56, 57])):
        found = client.chat.completions.create(model=task or "base", messages=messages, max_tokens=6, temperature=0)
        assert found.choices[0].message.content == greedy(task, text, 6)
        assert found.usage is not None and found.usage.prompt_tokens == len(ALL[task] if task else []) + len(text)
        parts = client.chat.completions.create(
            model=task or "base", messages=messages, max_tokens=6, temperature=0, stream=True
        )
        said = [part.choices[0].delta for part in parts]
        assert said[0].role == "assistant"
        assert "".join(delta.content or "" for delta in said) == found.choices[0].message.content


def test_streams_say_what_whole_answers_say(served: Running) -> None:
    client = served.client()
    asked: dict[str, Any] = {"model": "raw", "prompt": "w30 w31", "max_tokens": 9, "n": 3, "seed": 5, "logprobs": 2}
    whole = client.completions.create(**asked)
    assert len({choice.text for choice in whole.choices}) == 3
    texts: dict[int, str] = {0: "", 1: "", 2: ""}
    tokens: dict[int, list[str]] = {0: [], 1: [], 2: []}
    reasons, usage = {}, None
    for part in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += (choice.logprobs and choice.logprobs.tokens) or []
            reasons[choice.index] = choice.finish_reason
        usage = part.usage
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and whole.usage is not None and usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.tokens == tokens[choice.index]
        assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs or [])


def test_options_of_a_request(served: Running) -> None:
    client = served.client()
    text = greedy("raw", [30], 8)
    stop = text[text.index("w", 1) : text.index("w", 1) + 2]
    common: dict[str, Any] = {"model": "raw", "prompt": "w30", "temperature": 0}
    stopped = client.completions.create(**common, stop=[stop, "never"], max_tokens=8).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    short = client.completions.create(**common, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage is not None and short.usage.completion_tokens == 2
    long = client.completions.create(**common, max_tokens=40, extra_body={"min_tokens": 40})
    assert long.usage is not None and long.usage.completion_tokens == 40
    drawn = [client.completions.create(model="raw", prompt="w30", seed=seed, max_tokens=9) for seed in (7, 7, 8)]
    assert drawn[0].choices[0].text == drawn[1].choices[0].text != drawn[2].choices[0].text
    many = client.completions.create(**{**common, "prompt": ["w30", "w31", "w30"]}, max_tokens=4)
    assert [choice.text for choice in many.choices] == [greedy("raw", [token], 4) for token in (30, 31, 30)]
    ids = client.completions.create(**{**common, "prompt": [30]}, max_tokens=4)
    assert ids.choices[0].text == many.choices[0].text


@pytest.mark.parametrize(
    "asked, status, said",
    [
        ({"model": "nope"}, 404, "there is no model 'nope'"),
        ({"temperature": 3}, 400, "'temperature': Input should be less than or equal to 2"),
        ({"prompt": ""}, 400, "the text has no tokens"),
        ({"max_tokens": 500}, 400, "more than the model's 128 positions"),
        ({"n": 41}, 400, "asks for 41 answers at once, and the server takes 40"),
        ({"logit_bias": {"1": 1}}, 400, "'logit_bias' is not served here"),
        ({"model": "short"}, 400, "a text alone fills a template of one column"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_in_openai_s_shape(
    asked: dict[str, Any], status: int, said: str, stream: bool, served: Running
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        served.client().completions.create(**{"model": "raw", "prompt": "w30", "stream": stream, **asked})
    assert error.value.status_code == status and said in error.value.message
    assert set(error.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "path, body, method, status",
    [
        ("/v1/completions", b"{", None, 400),
        ("/v1/completions", b"[" * 10**5, None, 400),
        ("/v1/completions", b"\x00\xff", None, 400),
        ("/v1/completions", [1], None, 400),
        ("/v1/chat/completions", {"model": "base"}, None, 400),
        ("/v1/completions", b" " * (2**20 + 1), None, 413),
        ("/v1/completions", b" " * 2**26, None, 413),
        ("/v1/embeddings", {}, None, 404),
        ("/v1/models", None, "DELETE", 405),
        ("/v1/completions", None, "GET", 405),
    ],
)
def test_whatever_comes_is_refused_in_openai_s_shape(
    path: str, body: Any, method: str | None, status: int, served: Running
) -> None:
    found, content, _ = call(served, path, body, method)
    assert found == status and set(content["error"]) == {"message", "type", "param", "code"}


def test_a_key(prompts: Path) -> None:
    with serving(prompts, api_key="of gold") as served:
        assert next(model.id for model in served.client(api_key="of gold").models.list()) == "base"
        served.client(api_key="of gold").completions.create(model="long", prompt="w30")
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            served.client(api_key="of silver").completions.create(model="long", prompt="w30")
        for path, body in (("/v1/models", None), ("/v1/models/long", None), ("/v1/completions", {"model": "long"})):
            for headers in ({}, {"authorization": "of gold"}, {"authorization": "Basic of gold"}):
                status, content, sent = call(served, path, body, **headers)
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
                assert sent["www-authenticate"] == "Bearer"
        assert call(served, "/health")[0] == call(served, "/metrics")[0] == 200


def test_a_full_queue_says_when_to_come_again(prompts: Path) -> None:
    with serving(prompts, limits=Limits(max_queue=2, max_rows=1)) as served:
        step, until = served.engine._batch.step, time.monotonic() + 20
        client, held = served.client(), [True]

        def slow() -> None:
            while held[0] and time.monotonic() < until:
                time.sleep(0.002)
            step()

        served.engine._batch.step = slow  # type: ignore[method-assign]
        streams = [client.completions.create(model="raw", prompt="w30", max_tokens=5, stream=True)]
        wait(lambda: served.engine.running == 1)
        body = {"model": "raw", "prompt": ["w30", "w31"], "max_tokens": 5}
        sock = socket.create_connection(("127.0.0.1", served.port))
        raw = json.dumps(body).encode()
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
        wait(lambda: served.engine.waiting == 2)
        status, content, headers = call(served, "/v1/completions", {"model": "raw", "prompt": "w30"})
        assert (status, content["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        sock.close()  # who waits for a whole answer, and leaves
        wait(lambda: served.engine.waiting == 0)
        held[0] = False
        assert len([*streams[0]]) >= 1
        retrying = served.client(max_retries=2)
        assert retrying.completions.create(model="raw", prompt="w30", max_tokens=5).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(stream: bool, served: Running) -> None:
    body = {"model": "raw", "prompt": "w30", "max_tokens": 110, "min_tokens": 110, "stream": stream}
    step = served.engine._batch.step

    def slow() -> None:
        time.sleep(0.02)
        step()

    served.engine._batch.step = slow  # type: ignore[method-assign]
    try:
        raw = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
            wait(lambda: served.engine.running == 1)
            assert not stream or sock.recv(10)
        began = time.monotonic()
        wait(lambda: served.engine.running == 0)
        assert time.monotonic() - began < 1.5  # the whole answer takes more than two seconds
    finally:
        served.engine._batch.step = step  # type: ignore[method-assign]


def test_health_and_metrics(served: Running) -> None:
    served.client().completions.create(model="raw", prompt="w30", max_tokens=3)
    status, content, headers = call(served, "/health")
    assert status == 200 and json.loads(content) == {
        "status": "ok",
        "running": 0,
        "waiting": 0,
        "base": "base",
        "tasks": [*ALL],
        "whole_batches": None,
        "prompts_error": None,
    }
    status, content, headers = call(served, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'softprompt_requests_total{model="raw",status="200"}' in content and b"softprompt_running 0.0" in content


def test_raw_takes_texts_as_they_are(prompts: Path) -> None:
    with serving(prompts, raw=True) as served:
        found = served.client().completions.create(model="long", prompt="w30 w31", max_tokens=5, temperature=0)
        assert found.choices[0].text == greedy("long", [30, 31], 5)
        assert found.usage is not None and found.usage.prompt_tokens == len(HARD["long"]) + 2


def test_prompts_are_read_again_when_their_folder_changes(tmp_path: Path) -> None:
    save(tmp_path, {"one": [5, 6], "gone": [7]})
    with serving(tmp_path) as served:
        client = served.client()
        asked: dict[str, Any] = {"model": "one", "prompt": [30], "max_tokens": 6, "temperature": 0, "logprobs": 0}
        asked["extra_body"] = {"min_tokens": 6}
        before = client.completions.create(**asked).choices[0]
        save(tmp_path, {"one": [50, 51, 52], "new": [7]})
        wait(lambda: "new" in served.folder.current.names)
        after = client.completions.create(**asked)
        for found, hard in ((before, [5, 6]), (after.choices[0], [50, 51, 52])):
            # Before the fewest tokens, no end token is chosen, and the others share what it had.
            expected = alone(tiny.tiny_model(), hard, [30], 6, never=2)[1]
            assert found.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert after.usage.prompt_tokens == 4 and [model.id for model in client.models.list()] == ["base", "one", "new"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**asked, "model": "gone"})
