"""The API as OpenAI's own client sees it, on loopback."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lightning_softprompt import MixedTaskGenerator, TaskTemplate, attach
from lightning_softprompt.serving.admission import Limits
from tests import tiny
from tests.inference.tasks import HARD, ROWS, TEMPLATES, words
from tests.serving.helpers import RowMaking, Running, alone, call, prompts_of, save, serving, wait

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


def test_health_and_metrics(served: Running) -> None:
    served.client().completions.create(model="raw", prompt="w30", max_tokens=3)
    wait(lambda: served.engine.running == 0)
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


def test_the_folder_is_not_read_while_prompts_are_attached_and_the_other_way_round(tmp_path: Path) -> None:
    save(tmp_path, {"one": [5, 6]})
    with serving(tmp_path) as served:
        make = RowMaking(tiny.tiny_model(), prompts_of({"one": [7]}))
        asked = make([30], "one", 2)
        save(tmp_path, {"two": [5]})
        with served.engine.attaching:
            served.engine.submit([asked.row])
            time.sleep(1.5)  # longer than between two looks
            assert served.folder.current.names == ("base", "one") and not asked.parts
        wait(lambda: served.folder.current.names == ("base", "two") and asked.row.has_ended)
    assert asked.parts[0].finish_reason == "length"


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
