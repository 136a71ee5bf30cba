"""What a shell needs to complete commands."""

from __future__ import annotations

import subprocess

import pytest

from lightning_softprompt import cli
from tests.cli.command_line import refused


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_its_options(shell, tmp_path, capsys) -> None:
    cli.main(["completion", "--shell", shell])
    script = capsys.readouterr().out
    for word in ("fit", "remove-task", "max_batch_tokens", "ckpt_path"):
        assert word in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        assert subprocess.run(["bash", "-n", tmp_path / "script"]).returncode == 0
    assert "bash, zsh, " in refused(capsys, "completion", "--shell", "nosh")
