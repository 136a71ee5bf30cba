"""Commands as a user gives them: their options, in this process or in one of its own, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_softprompt import cli

ROOT = Path(__file__).parents[2]


def overrides(base: Path, folder: Path) -> list[str]:
    return [
        f"--model.init_args.base={base}",
        f"--data.init_args.tokenizer={base}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=2",
    ]


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lightning_softprompt.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stderr
    return result


def said(capsys, *arguments: object) -> Any:
    cli.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, arguments)))
    assert exit_.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def word_tokenizer_of(base: Path) -> Any:
    from lightning_softprompt.base.loading import load_tokenizer

    return load_tokenizer(base)
