"""The command `serve`: what it is given, and what it says."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_softprompt import cli
from tests.cli.command_line import refused, said
from tests.serving.helpers import save


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    save(tmp_path / "prompts", {"tone": [5, 6], "topic": [7]})
    return tmp_path / "prompts"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served; nothing listens."""
    from lightning_softprompt.serving import api, server

    found: list[Any] = []
    make = api.make_app
    monkeypatch.setattr(api, "make_app", lambda *given: found.extend(given) or make(*given))

    def run(self: server.Server, sockets: list[Any]) -> None:
        found.append(sockets[0].getsockname())
        self._listens()

    monkeypatch.setattr(server.Server, "run", run)
    return found


def test_it_says_where_it_serves_what(tiny_base: Path, prompts: Path, started: list[Any], capsys) -> None:
    found = said(capsys, "serve", "--base", tiny_base, "--prompts", prompts, "--port", 0)
    *_, (host, port) = started
    assert host == "127.0.0.1" and port > 0
    expected = {"url": f"http://127.0.0.1:{port}/v1", "models": [tiny_base.name, "tone", "topic"]}
    assert found == {**expected, "whole_batches": None}
    cli.main(["serve", "--base", str(tiny_base), "--prompts", str(prompts), "--port", "0", "--name", "mine"])
    assert capsys.readouterr().out.startswith("serving mine, tone, topic at http://127.0.0.1:")


def test_options_reach_the_server(tiny_base: Path, prompts: Path, started: list[Any], monkeypatch) -> None:
    options = "--port=0 --max_rows=3 --max_queue=4 --max_batch_tokens=50 --max_new_tokens=6 --max_body_bytes=7"
    given = ["serve", f"--base={tiny_base}", f"--prompts={prompts}", *options.split()]
    cli.main([*given, "--api_key", "of gold", "--raw", "--dtype=bfloat16", "--device=cpu"])
    engine, folder, _, settings, _ = started
    limits = engine.limits
    assert (limits.max_rows, limits.max_queue, limits.max_batch_tokens, engine.longest) == (3, 4, 50, 50)
    assert (settings.api_key, settings.max_new_tokens, settings.max_body_bytes) == ("of gold", 6, 7)
    assert str(engine._model.dtype) == "torch.bfloat16" and folder._raw
    started.clear()
    monkeypatch.setenv("LIGHTNING_SOFTPROMPT_API_KEY", "of silver")
    cli.main(given)
    assert started[3].api_key == "of silver" and not started[1]._raw


def test_whoever_lets_everybody_in_is_told(tiny_base: Path, prompts: Path, started: list[Any], caplog) -> None:
    given = ["serve", f"--base={tiny_base}", f"--prompts={prompts}", "--port=0"]
    with caplog.at_level(logging.WARNING):
        cli.main(given)
        cli.main([*given, "--host=0.0.0.0", "--api_key=of gold"])
        assert "may ask" not in caplog.text
        cli.main([*given, "--host=0.0.0.0"])
    assert "may ask, as there is no api_key" in caplog.text


@pytest.mark.parametrize(
    "option, error",
    [
        ("--max_rows=0", "max_rows must be at least 1, got 0"),
        ("--max_new_tokens=0", "max_new_tokens must be at least 1, got 0"),
        ("--max_body_bytes=-1", "max_body_bytes must be at least 1, got -1"),
        ("--port=99999999", "cannot be had"),
        ("--host=256.1.1.1", "is no address of this machine"),
        ("--name=tone", "has a task 'tone', and the base has this name, too"),
        ("--device=nowhere", "the model cannot be put on 'nowhere'"),
        ("--dtype=int64", "'int64' is no dtype of weights"),
        ("--dtype=nothing", "'nothing' is no dtype of weights"),
        ("--api_key=", "the api_key is empty, has space around it or holds control characters"),
        ("--api_key=of gold\n", "so that no client can send it; give another one, or none"),
        ("--prompts=gone", "there are no saved prompts 'gone'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_listens(
    option: str, error: str, tiny_base: Path, prompts: Path, started: list[Any], capsys
) -> None:
    last = refused(capsys, "serve", f"--base={tiny_base}", f"--prompts={prompts}", "--port=0", option)
    assert last.startswith("error: ") and error in last
    assert not any(isinstance(each, tuple) for each in started)


def test_prompts_that_are_not_there_are_said_before_the_base_is_loaded(started: list[Any], capsys) -> None:
    last = refused(capsys, "serve", "--base=nowhere", "--prompts=gone", "--port=0")
    assert "there are no saved prompts 'gone'" in last and not started


def test_without_its_packages_it_says_what_to_install(tiny_base: Path, prompts: Path, capsys, monkeypatch) -> None:
    own = builtins.__import__

    def without(name: str, *given: Any, **options: Any) -> Any:
        if name == "lightning_softprompt.serving":
            raise ModuleNotFoundError("No module named 'uvicorn'")
        return own(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    last = refused(capsys, "serve", f"--base={tiny_base}", f"--prompts={prompts}")
    assert "No module named 'uvicorn'" in last and "pip install 'lightning-softprompt[serve]'" in last
