"""What `--ckpt_path` may be, told before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.index import INDEX_NAME

_OF_THIS_RUN = ("best", "last", "hpc", "registry")  # words of the Trainer for a checkpoint that it finds by itself
_PARTS = (".metadata", "meta.pt")  # what a checkpoint of several ranks holds, which is a folder


def check_checkpoint_argument(command: str, path: str | None) -> None:
    """Raise a `SoftPromptError` if `path` names no checkpoint that `command` can load."""
    if path is None or "://" in path:
        return
    if path == "best" or (path in _OF_THIS_RUN and command != "fit"):
        raise SoftPromptError(
            f"--ckpt_path {path} names a checkpoint of the run under way, and this one has trained nothing; give the "
            "path of the checkpoint that fit told at its end"
        )
    if path in _OF_THIS_RUN:
        return
    if not Path(path).exists():
        raise SoftPromptError(f"--ckpt_path {path} does not exist; looked in {Path.cwd()}")
    if Path(path).is_dir() and not any((Path(path) / part).exists() for part in _PARTS):
        raise SoftPromptError(_about_folder(command, Path(path)))


def _about_folder(command: str, path: Path) -> str:
    if (path / INDEX_NAME).exists():
        return f"--ckpt_path {path} is a folder of prompts, not a checkpoint; give it as --prompts.tasks {path}"
    found = sorted(path.rglob("*.ckpt"), key=lambda file: -file.stat().st_mtime)
    newest = f"; the newest file in it: {found[0]}" if found else ""
    return f"--ckpt_path {path} is a folder, and {command} takes a checkpoint file{newest}"
