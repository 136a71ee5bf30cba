"""The command `lightning-softprompt`."""

from lightning_softprompt.cli.main import main

__all__ = ["main"]
