"""What `--ckpt_path` may be, told before a model is loaded, and that no code in it runs."""

from __future__ import annotations

from pathlib import Path

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.index import INDEX_NAME
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

_OF_THIS_RUN = ("best", "last", "hpc", "registry")  # words of the Trainer for a checkpoint that it finds by itself
_PARTS = (".metadata", "meta.pt")  # what a checkpoint of several ranks holds, which is a folder


def check_checkpoint_argument(command: str, path: str | None, weights_only: bool | None = None) -> None:
    """Raise a `SoftPromptError` if `path` names no checkpoint that `command` can load.

    A file is read, as Lightning would read it only after the base is loaded. What lies behind a URL is not looked at.

    Args:
        command: the command.
        path: what stands behind `--ckpt_path`.
        weights_only: what stands behind `--weights_only`.
    """
    if path is None or _is_remote(path):
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
    if Path(path).is_file() and weights_only is not False:
        SoftPrompts.from_checkpoint(path)
    if Path(path).is_dir() and not any((Path(path) / part).exists() for part in _PARTS):
        raise SoftPromptError(_about_folder(command, Path(path)))


def loads_weights_only(path: str | None, said: bool | None) -> bool:
    """Whether a checkpoint is read as tensors and plain values alone, so that no code in it can run.

    It is, unless the user says otherwise (`said`) of a file on this machine. Lightning 2.6 unpickles what comes from
    elsewhere.

    Raises:
        SoftPromptError: the user wants to unpickle what comes from elsewhere.
    """
    if said is False and path is not None and (_is_remote(path) or path == "registry"):
        raise SoftPromptError(
            f"--weights_only false would run what is in {path}; if you trust it, copy the file to this machine first"
        )
    return said is not False


def _is_remote(path: str) -> bool:
    """Whether a path is one of fsspec: a URL, or protocols in a chain."""
    return "://" in path or "::" in path


def _about_folder(command: str, path: Path) -> str:
    if (path / INDEX_NAME).exists():
        return f"--ckpt_path {path} is a folder of prompts, not a checkpoint; give it as --prompts.tasks {path}"
    found = sorted(path.rglob("*.ckpt"), key=lambda file: -file.stat().st_mtime)
    newest = f"; the newest file in it: {found[0]}" if found else ""
    return f"--ckpt_path {path} is a folder, and {command} takes a checkpoint file{newest}"
