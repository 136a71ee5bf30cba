"""The command line: which command is meant, help, and errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_softprompt import SoftPrompts, Tokens, cli
from lightning_softprompt.cli.main import ROOMS
from tests import tiny
from tests.cli.command_line import ROOT, overrides, run


def test_help_of_every_command(capsys) -> None:
    cli.main([])
    assert "fit, validate, test, predict" in capsys.readouterr().out
    for command in ROOMS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "--help"])
        assert exit_.value.code == 0
    assert "unknown" not in capsys.readouterr().out


def test_errors_end_with_one_line(tiny_base, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        cli.main(
            [
                "fit",
                "--config=examples/mixed_tasks.yaml",
                *overrides(tiny_base, tmp_path),
                "--data.init_args.train=gone.jsonl",
            ]
        )
    assert exit_.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: gone.jsonl does not exist")
    for argument in ("--model.init_args.base", "--data.init_args.tokenizer"):
        result = run(
            "fit",
            "--config=examples/mixed_tasks.yaml",
            *overrides(tiny_base, tmp_path),
            f"{argument}={tmp_path / 'gone'}",
            check=False,
        )
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"could be loaded from '{tmp_path / 'gone'}'; give the id of a model on the hub" in result.stderr


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (
            ["fit", "--data.init_args.train={path: a.jsonl, num_rows: 5}"],
            1,
            "num_rows must be at least 1 and belongs to",
        ),
        (["validate", "--data.init_args.validation=null"], 1, "there is no validation source"),
        (["validate", "--ckpt_path=gone.ckpt"], 1, "gone.ckpt"),
        (["fit", "--trainer.devices=0"], 1, "value is not a valid input using cpu accelerator"),
        (
            ["add_task"],
            2,
            "there is no command 'add_task'; do you mean 'add-task'? commands: fit, validate, test",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments, status, message, tiny_base, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    command, *rest = arguments
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--config=examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), *rest])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == status and last.startswith("error: ") and message in last


@pytest.mark.parametrize(
    "arguments, status, printed",
    [
        (["--help"], None, "usage: lightning-softprompt COMMAND"),
        ([], None, "usage: lightning-softprompt COMMAND"),
        (["--version"], None, "lightning-softprompt "),
        (["fitt"], 2, "error: there is no command 'fitt'; do you mean 'fit'? commands: fit, validate"),
    ],
)
def test_what_needs_no_model_loads_no_torch(arguments: list[str], status: int | None, printed: str) -> None:
    code = (
        "import sys\n"
        "from lightning_softprompt.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "    status = None\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'datasets', 'jsonargparse'} & set(sys.modules)\n"
        "print('status', status, 'loaded', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"status {status} loaded []"


SHELL = "import sys; sys.argv[0] = 'lightning-softprompt'; from lightning_softprompt.cli.main import main; main()"


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "inspect", "inspect --json"])
def test_where_nobody_reads_it_ends_without_a_word(command: str, buffered: str, tmp_path) -> None:
    SoftPrompts.for_model(tiny.tiny_model(), {"tone": 4}).save_pretrained(tmp_path)
    name, *more = command.split()
    given = [name, *(["--prompts", str(tmp_path)] if name == "inspect" else []), *more]
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has seen enough
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    done = subprocess.run(
        [sys.executable, "-c", SHELL, *given], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_where_there_is_no_room_for_what_is_printed_it_is_said(buffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", SHELL, "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 1 and done.stderr.decode().splitlines() == ["error: [Errno 28] No space left on device"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, tmp_path) -> None:
    tasks = ["日本", "é", "\U0001f600"]
    made = SoftPrompts.for_model(tiny.tiny_model(), {task: Tokens([5]) for task in tasks})
    made.save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for more in ([], ["--json"]):
        command = [sys.executable, "-c", SHELL, "inspect", "--prompts", str(tmp_path), *more]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        out = done.stdout.decode(encoding)
        if more:
            assert [each["task"] for each in json.loads(out)["tasks"]] == tasks
        else:
            assert r"\u65e5\u672c" in out and r"\U0001f600" in out


def test_the_version_is_that_of_what_is_installed() -> None:
    assert run("--version").stdout == f"lightning-softprompt {version('lightning-softprompt')}\n"


def test_an_error_of_any_class_is_one_line_and_with_debug_a_traceback(capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room\nfor \x1b[31m that")

    monkeypatch.setattr("lightning_softprompt.cli.folders.SoftPrompts.from_pretrained", fail)
    for arguments in (["inspect", "--prompts", "a"], ["inspect", "--debug", "--prompts", "a"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        *above, last = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == 1
        assert last == r"error: no room for \x1b[31m that (RuntimeError; --debug shows where)"
        assert any("Traceback" in line for line in above) == ("--debug" in arguments) == bool(above)
