"""`--ckpt_path`: what is no checkpoint is refused by name, before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.cli.checkpoint_argument import check_checkpoint_argument
from tests.cli.command_line import ROOT, overrides, refused

REFUSED = [
    ("test", "best", "best names a checkpoint of the run under way, and this one has trained nothing; give the path"),
    ("fit", "best", "best names a checkpoint of the run under way"),
    ("test", "last", "last names a checkpoint of the run under way"),
    ("predict", "gone.ckpt", "gone.ckpt does not exist; looked in /"),
    ("test", "prompts", r"prompts is a folder of prompts, not a checkpoint; give it as --prompts.tasks prompts"),
    ("test", "run", "run is a folder, and test takes a checkpoint file; the newest file in it: run/a/new.ckpt"),
    ("fit", "empty", "empty is a folder, and fit takes a checkpoint file$"),
]


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
    check_checkpoint_argument("test", path)
    check_checkpoint_argument("fit", "last")


def test_the_command_says_it_in_one_line(capsys, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    config = ["--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path)]
    assert refused(capsys, "test", *config, "--ckpt_path", tmp_path / "prompts").startswith("error: --ckpt_path ")
