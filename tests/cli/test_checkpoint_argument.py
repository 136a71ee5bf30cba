"""`--ckpt_path`: what is no checkpoint is refused by name, before a model is loaded."""

from __future__ import annotations

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from lightning_softprompt import SoftPromptError, cli
from lightning_softprompt.cli.checkpoint_argument import check_checkpoint_argument, loads_weights_only
from tests.cli.command_line import ROOT, overrides, refused, said

REFUSED = [
    ("test", "best", "best names a checkpoint of the run under way, and this one has trained nothing; give the path"),
    ("fit", "best", "best names a checkpoint of the run under way"),
    ("test", "last", "last names a checkpoint of the run under way"),
    ("predict", "gone.ckpt", "gone.ckpt does not exist; looked in /"),
    ("test", "prompts", r"prompts is a folder of prompts, not a checkpoint; give it as --prompts.tasks prompts"),
    ("test", "run", "run is a folder, and test takes a checkpoint file; the newest file in it: run/a/new.ckpt"),
    ("fit", "empty", "empty is a folder, and fit takes a checkpoint file$"),
]


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prompts/soft_prompts.json", "run/a/old.ckpt", "run/a/new.ckpt", "parts/.metadata", "one.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "run/a/old.ckpt", (0, 0))


@pytest.mark.parametrize(("command", "path", "message"), REFUSED)
def test_what_is_refused(command: str, path: str, message: str) -> None:
    with pytest.raises(SoftPromptError, match=f"^--ckpt_path {message}"):
        check_checkpoint_argument(command, path)


@pytest.mark.parametrize("path", [None, "one.ckpt", "parts", "https://somewhere/one.ckpt"])
def test_what_may_be_a_checkpoint(path: str | None) -> None:
    torch.save({"state_dict": {"model.soft_prompts.prompt:a": torch.ones(2, 3)}}, "one.ckpt")
    check_checkpoint_argument("test", path)
    check_checkpoint_argument("fit", "last")


@pytest.mark.parametrize("content", [b"", b"this is no checkpoint\n", b"\x80\x02garbage", b"PK\x03\x04zz", b'{"a": 1}'])
def test_a_file_that_is_no_checkpoint_is_told_before_a_base_is_loaded(content: bytes) -> None:
    Path("one.ckpt").write_bytes(content)
    with pytest.raises(SoftPromptError, match=r"one\.ckpt is damaged or no checkpoint"):
        check_checkpoint_argument("fit", "one.ckpt")
    check_checkpoint_argument("fit", "one.ckpt", weights_only=False)


def test_only_a_file_of_this_machine_is_unpickled_and_only_if_the_user_says_so() -> None:
    assert loads_weights_only(None, None) and loads_weights_only("https://a/b.ckpt", None)
    assert not loads_weights_only("one.ckpt", False)
    for path in ("https://a/b.ckpt", "file:///one.ckpt", "simplecache::s3://a/b", "filecache::/one.ckpt", "registry"):
        with pytest.raises(SoftPromptError, match="would run what is in"):
            loads_weights_only(path, False)


@pytest.mark.parametrize("scheme", ["http", "file", "memory", "simplecache::file"])
def test_no_pickle_runs_from_wherever_it_comes(scheme, capsys, tiny_base, tmp_path, monkeypatch) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": Runs(marker)}, "evil.ckpt")
    url = f"{scheme}://{tmp_path}/evil.ckpt"
    server = None
    if scheme == "http":
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/evil.ckpt"
    elif scheme == "memory":
        fsspec.filesystem("memory").pipe_file("/evil.ckpt", Path("evil.ckpt").read_bytes())
        url = "memory://evil.ckpt"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    config = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path)]
    try:
        line = refused(capsys, "validate", *config, "--ckpt_path", url)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    assert not marker.exists() and line.startswith("error: the checkpoint holds objects that could run code")


def test_a_checkpoint_changes_no_setting_of_a_run(capsys, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), "--trainer.max_epochs=1"]
    path = said(capsys, "fit", *config)["checkpoint"]
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"_class_path": "lightning_softprompt.PromptDistillation", "base": "elsewhere"}
    torch.save(content, tmp_path / "one.ckpt")
    found = said(capsys, "validate", *config, "--ckpt_path", tmp_path / "one.ckpt")
    assert "val/accuracy" in found["metrics"]


def test_the_command_says_it_in_one_line(capsys, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path)]
    assert refused(capsys, "test", *config, "--ckpt_path", tmp_path / "prompts").startswith("error: --ckpt_path ")


@pytest.mark.filterwarnings("default")
def test_nothing_is_said_of_callbacks_where_nothing_trains(capsys, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config=examples/mixed_tasks.yaml", "--trainer.callbacks=null"]
    path = said(capsys, "fit", *config, *overrides(tiny_base, tmp_path), "--trainer.max_epochs=1")["checkpoint"]
    assert any("BestPrompts" in key for key in torch.load(path, weights_only=True)["callbacks"])
    test = ["--data.init_args.test=examples/data/reviews.validation.jsonl"]
    for command, more in (("validate", []), ("test", test), ("predict", [])):
        cli.main([command, *config, *overrides(tiny_base, tmp_path / command), *more, "--ckpt_path", path])
        assert "warning" not in capsys.readouterr().err, command
