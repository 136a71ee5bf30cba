"""What the server refuses: with status 400 or 404, and it goes on; or at its start, in one line."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREPARED, client_of
from openai import APIStatusError
from server import Server


def status(server: Server, route: str = "completions", **body: Any) -> tuple[int, str]:
    """The status of a request, and what the server says."""

    async def post() -> tuple[int, str]:
        async with client_of(server) as client:
            try:
                answer = await client.post(f"/{route}", cast_to=dict, body={"max_tokens": 2, "temperature": 0} | body)
            except APIStatusError as error:
                return error.status_code, str(error)
            return 200, str(answer)

    return asyncio.run(post())


def tensor() -> str:
    file = io.BytesIO()
    torch.save(torch.zeros(4, 576), file)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("model", ["base", "soft-a", "review"])
def test_tensors_of_clients(server: Server, model: str) -> None:
    for body in ({"prompt_embeds": tensor()}, {"prompt_embeds": tensor(), "prompt": "so"}, {"prompt_embeds": "AAAA"}):
        found, told = status(server, model=model, **body)
        assert found == 400 and "prompt_embeds" in told, told
    part = {"type": "prompt_embeds", "data": tensor()}
    for route, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": [part]}]}),
        ("responses", {"input": [{"role": "user", "content": [part]}]}),
    ):
        found, told = status(server, route, model=model, **body)
        assert found == 400 and "prompt_embeds" in told, told
    assert status(server, model=model, prompt=[5])[0] == 200


@pytest.mark.parametrize("model", ["base", "soft-a"])
def test_ids_that_the_model_does_not_have(server: Server, model: str) -> None:
    """One that is looked up ends the engine, and with it all requests."""
    for prompt in ([49_152], [5, 10**6], "so <prompt_embeds> it is"):
        found, told = status(server, model=model, prompt=prompt)
        assert found == 400 and "token ids from 0 to 49151" in told, told
    messages = [{"role": "user", "content": "<prompt_embeds>"}]
    assert status(server, "chat/completions", model=model, messages=messages)[0] == 400
    assert status(server, model=model, prompt="so")[0] == 200


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt_logprobs": 1}, "'soft-a' has no prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "'soft-a' has no prompt_logprobs"),
        ({"prompt": [5] * 490}, "the text has 490 tokens and the prompt of 'soft-a' has 32"),
        ({"prompt": [5] * 490, "stream": True}, "the text has 490 tokens and the prompt of 'soft-a' has 32"),
        ({"model": "pair"}, "a text alone fills a template of one column"),
    ],
)
def test_what_a_task_cannot_serve(server: Server, body: dict[str, Any], told: str) -> None:
    found, said = status(server, **{"model": "soft-a", "prompt": "so", **body})
    assert found == 400 and told in said


def test_names_that_nobody_has(server: Server, expected: dict[str, Any]) -> None:
    async def models() -> list[Any]:
        async with client_of(server) as client:
            return (await client.models.list()).data

    found = asyncio.run(models())
    assert [each.id for each in found] == ["base", *expected["tasks"]["first"]]
    assert {each.parent for each in found[1:]} == {"base"}
    for name in ("nobody", "SOFT-A", "soft-a "):
        assert status(server, model=name, prompt="so")[0] == 404


def test_a_folder_of_another_base_ends_the_server_in_one_line(expected: dict[str, Any], tmp_path: Path) -> None:
    server = Server(expected["base"], tmp_path / "log", PREPARED / "other-base", "--enable-prompt-embeds")
    assert server.status() == 1
    (line,) = [line for line in server.log.read_text().splitlines() if line.startswith("softprompt: ")]
    assert "the prompts were trained for another base model (another) than " in line
