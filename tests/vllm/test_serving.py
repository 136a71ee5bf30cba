"""Tests of tasks on vLLM's server, beside stand-ins. `integrations/vllm/tests` has the same on the real one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from softprompt_vllm.base_model import ServedModel
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.settings import Settings
from softprompt_vllm.tasks import Task
from softprompt_vllm.templates import Template

from lightning_softprompt import SoftPrompts
from tests import tiny
from tests.tokenizer import word_tokenizer

PARAMS = SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=None)


class Request(SimpleNamespace):
    """As vLLM's request of completions: a pydantic model."""

    def model_copy(self, update: dict[str, Any]) -> Request:
        return Request(**{**vars(self), **update})


class Engine:
    """As vLLM's engine client: it notes what reaches the engine."""

    def __init__(self, folder: Path, embeddings: bool = True) -> None:
        self.renderer = SimpleNamespace(tokenizer=word_tokenizer(["good", "=>", "film"]))
        self.model_config = SimpleNamespace(
            model=str(folder),
            revision=None,
            dtype=torch.float32,
            max_model_len=16,
            enable_prompt_embeds=embeddings,
            get_inputs_embeds_size=lambda: 32,
            get_vocab_size=lambda: tiny.VOCABULARY,
        )
        self.got: list[dict[str, Any]] = []

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> str:
        self.got.append({"prompt": prompt, **options})
        return f"the answer to {request_id}"


class Renderer:
    """As vLLM's renderer of requests; `meanwhile` is what happens while it works."""

    meanwhile: Iterator[Callable[[], None]] = iter(())

    async def render_completion(self, request: Any, **options: Any) -> Any:
        for happens in self.meanwhile:
            happens()
            break
        return request.prompt


def running(serving: ModuleType, engine: Engine, settings: Settings) -> SimpleNamespace:
    """A server's state with the tasks of a folder; its watcher does not run, as there is no loop when this ends."""
    models = SimpleNamespace(
        lora_requests={"adapter": SimpleNamespace(lora_name="adapter")},
        base_model_paths=[SimpleNamespace(name="base")],
        is_base_model=lambda name: name == "base",
    )
    state = SimpleNamespace(openai_serving_models=models, online_renderer=Renderer())

    async def start() -> None:
        state.serving = serving.Serving(engine, state, settings)

    asyncio.run(start())
    return SimpleNamespace(state=state, engine=engine, names=models.lora_requests, serving=state.serving)


@pytest.fixture
def server(serving: ModuleType, saved: Path, served: ServedModel) -> SimpleNamespace:
    return running(serving, Engine(served.folder), Settings(saved, raw=False))


def token(*ids: int, **options: Any) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [*ids], **options}


def test_each_task_is_a_model_name_beside_the_others(server) -> None:
    assert list(server.names) == ["adapter", "tone", "größe.2", "talk"]
    found = server.names["größe.2"]
    assert (found.lora_name, found.base_model_name) == ("größe.2", "base") and found.lora_int_id > 100_000


def test_the_rows_of_the_task_that_is_asked_for_stand_in_front_of_the_ids(server, bank: SoftPrompts) -> None:
    for name in ("größe.2", "tone", "talk", "tone"):
        prompt = token(7, 0, 60, prompt="text", cache_salt="salt", arrival_time=1.0)
        answer = server.engine.generate(prompt, PARAMS, "r1", lora_request=server.names[name], priority=3)
        got, rows = server.engine.got[-1], bank[name].detach()
        assert answer == "the answer to r1" and got["lora_request"] is None and got["priority"] == 3
        made = got["prompt"]
        assert made["type"] == "embeds" and (made["prompt"], made["cache_salt"]) == ("text", "salt")
        assert torch.equal(made["prompt_embeds"][: len(rows)], rows) and len(made["prompt_embeds"]) == len(rows) + 3
        assert made["prompt_token_ids"][len(rows) :] == [7, 0, 60]
        assert made["is_token_ids"] == [False] * len(rows) + [True] * 3


def test_the_base_and_adapters_get_what_they_get_without_the_plugin(server) -> None:
    prompt = token(7)
    server.engine.generate(prompt, PARAMS, "r1")
    server.engine.generate(prompt, PARAMS, "r2", lora_request=server.names["adapter"])
    assert all(got["prompt"] is prompt for got in server.engine.got)
    assert [got["lora_request"] for got in server.engine.got] == [None, server.names["adapter"]]
    assert asyncio.run(server.state.online_renderer.render_completion(Request(model="base", prompt="good"))) == "good"


def test_clients_cannot_send_tensors_once_the_server_runs(server) -> None:
    assert server.engine.model_config.enable_prompt_embeds is False
    with pytest.raises(SoftPromptError, match="takes text or token ids alone"):
        server.engine.generate({"type": "embeds"}, PARAMS, "r1", lora_request=server.names["tone"])


@pytest.mark.parametrize("name", ["tone", "base"])
@pytest.mark.parametrize("wrong", [61, -1, 10**9])
def test_ids_that_would_end_the_engine_are_refused(server, name: str, wrong: int) -> None:
    with pytest.raises(SoftPromptError, match=f"token ids from 0 to 60, found {wrong}"):
        server.engine.generate(token(1, wrong, 2), PARAMS, "r1", lora_request=server.names.get(name))
    assert not server.engine.got


def test_logprobs_of_prompts_are_refused(server) -> None:
    for option in ("prompt_logprobs", "prompt_logprob_token_ids"):
        params = SimpleNamespace(**{**vars(PARAMS), option: 0})
        with pytest.raises(SoftPromptError, match="'tone' has no prompt_logprobs"):
            server.engine.generate(token(1), params, "r1", lora_request=server.names["tone"])
        server.engine.generate(token(1), params, "r2")


def test_prompt_and_text_have_to_leave_room_for_a_token(server) -> None:
    server.engine.generate(token(*range(12)), PARAMS, "r1", lora_request=server.names["tone"])
    with pytest.raises(SoftPromptError, match="the text has 13 tokens and the prompt of 'tone' has 3"):
        server.engine.generate(token(*range(13)), PARAMS, "r2", lora_request=server.names["tone"])


def test_virtual_tokens_of_an_export_go_in_as_ids(serving, tmp_path: Path) -> None:
    engine = Engine(tmp_path, embeddings=False)
    (tmp_path / "virtual_tokens.json").write_text('{"start": [1], "tasks": {"tone": [58, 59]}}')
    server = running(serving, engine, Settings(None, raw=False))
    engine.generate(token(7, prompt="text"), PARAMS, "r1", lora_request=server.names["tone"])
    assert engine.got[-1]["prompt"] == token(58, 59, 1, 7, prompt="text")
    assert server.serving._watcher is None


def rendered(server: Any, name: str, prompt: Any) -> Any:
    return asyncio.run(server.state.online_renderer.render_completion(Request(model=name, prompt=prompt)))


def test_texts_of_completions_go_into_the_template_of_their_task(server, serving, saved, served) -> None:
    ids = word_tokenizer(["good", "=>", "film"])("good film =>")["input_ids"]
    assert rendered(server, "tone", "good film") == ids
    assert rendered(server, "tone", ["good film", "good film"]) == [ids, ids]
    for whole in ([4, 6], [[4], [6]]):
        assert rendered(server, "tone", whole) == whole
    assert rendered(server, "größe.2", "good") == "good"  # it has no template
    raw = running(serving, Engine(served.folder), Settings(saved, raw=True))
    assert rendered(raw, "tone", "good film") == "good film"


def test_a_text_that_the_template_cannot_take_is_refused(server) -> None:
    with pytest.raises(SoftPromptError, match="no chat template"):
        rendered(server, "talk", "good")


def test_template_and_prompt_are_of_one_save(server) -> None:
    """The folder changes while a request is rendered: it is rendered again, for the prompt that it will get."""
    changed = Task("tone", torch.zeros(2, 32), Template("film {text}"))
    server.state.online_renderer.meanwhile = iter([lambda: server.serving._publish({"tone": changed})])
    ids = word_tokenizer(["good", "=>", "film"])("film good")["input_ids"]
    assert rendered(server, "tone", "good") == ids
    server.engine.generate(token(*ids), PARAMS, "r1", lora_request=server.names["tone"])
    assert len(server.engine.got[-1]["prompt"]["is_token_ids"]) == 2 + len(ids)


def test_a_request_keeps_the_prompt_that_it_began_with(server, bank: SoftPrompts) -> None:
    """As a search by beams does, which asks the engine once a token."""
    began = server.names["tone"]
    server.serving._publish({"tone": Task("tone", torch.zeros(3, 32))})
    server.engine.generate(token(7), PARAMS, "r1", lora_request=began)
    assert torch.equal(server.engine.got[-1]["prompt"]["prompt_embeds"][:3], bank["tone"].detach())


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_name_that_is_taken_changes_nothing(server, name: str) -> None:
    before = dict(server.names)
    with pytest.raises(SoftPromptError, match=f"the task '{name}' has the name of a served model or adapter"):
        server.serving._publish({"new": Task("new", (1,)), name: Task(name, (1,))})
    assert server.names == before


def test_a_folder_that_does_not_fit_changes_nothing(serving, saved: Path, served: ServedModel) -> None:
    engine = Engine(served.folder, embeddings=False)
    before = engine.generate
    with pytest.raises(SoftPromptError, match="--enable-prompt-embeds"):
        running(serving, engine, Settings(saved, raw=False))
    assert engine.generate == before


def test_the_folder_is_served_as_it_is(serving, saved, served, bank, monkeypatch, caplog) -> None:
    """A save is served, a broken one is told once and leaves what was, and a save after it is served again."""
    monkeypatch.setattr(serving, "INTERVAL", 0.01)
    server = SimpleNamespace()

    async def until(holds: Callable[[], bool]) -> None:
        for _ in range(500):
            await asyncio.sleep(0.01)
            if holds():
                return
        raise AssertionError("nothing changed")

    async def run() -> None:
        models = SimpleNamespace(
            lora_requests={}, base_model_paths=[SimpleNamespace(name="base")], is_base_model=lambda name: False
        )
        state = SimpleNamespace(openai_serving_models=models, online_renderer=Renderer())
        server.serving = serving.Serving(Engine(served.folder), state, Settings(saved, raw=False))
        bank.subset(["tone"]).save_pretrained(saved)
        await until(lambda: list(models.lora_requests) == ["tone"])
        (saved / "soft_prompts.json").write_text("{")
        with caplog.at_level(logging.ERROR):
            await until(lambda: "still serving the tasks of before" in caplog.text)
            await asyncio.sleep(0.1)
        assert list(models.lora_requests) == ["tone"] and len(caplog.records) == 1
        bank.save_pretrained(saved)
        await until(lambda: len(models.lora_requests) == 3)

    asyncio.run(run())
