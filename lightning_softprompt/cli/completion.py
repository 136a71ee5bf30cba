"""The command `completion`: a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse

import shtab
from jsonargparse import auto_parser

from lightning_softprompt.cli.main import ROOMS, function_of
from lightning_softprompt.errors import SoftPromptError


def completion(shell: str = "bash") -> None:
    """Print a script with which a shell completes commands and options.

    For bash: lightning-softprompt completion > ~/.local/share/bash-completion/completions/lightning-softprompt

    Args:
        shell: bash, zsh, fish or tcsh.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise SoftPromptError(f"shell must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
    parser = argparse.ArgumentParser("lightning-softprompt")
    commands = parser.add_subparsers()
    for name, room in ROOMS.items():
        if room != "trainer":
            function = function_of(name)
            known = auto_parser(function, as_positional=False, add_help=False)
            commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0], parents=[known])
            continue
        options = commands.add_parser(name, help=f"{name} what a config says")
        options.add_argument("--config", "-c").complete = shtab.FILE  # type: ignore[attr-defined]
        options.add_argument("--ckpt_path").complete = shtab.FILE  # type: ignore[attr-defined]
        options.add_argument("--print_config", action="store_true")
        options.add_argument("--json", action="store_true")
    print(shtab.complete(parser, shell))
