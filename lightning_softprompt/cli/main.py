"""The command line: find the command, run it, and print its errors.

No slow import is made before a command runs, so that `--help` and an unknown command are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lightning_softprompt import __version__
from lightning_softprompt.errors import SoftPromptError

_USAGE = """usage: lightning-softprompt COMMAND [--help] [options]

Prompt tuning of a frozen causal LM, many tasks at once.

  fit, validate, test, predict   run a config: lightning-softprompt fit --config run.yaml
                                 (fit leaves the trained prompts in a folder whose name it prints)
  generate                       answer the rows of a JSONL file with trained prompts
  classify                       the likeliest label of each row, and the probabilities of all
  distill                        teach a short soft prompt what a long hard prompt makes a model say
  serve                          answer requests by OpenAI's API, each task as a model
  inspect                        lengths, norms, likeness and neighbours of a folder's prompts
  add-task, remove-task          change the tasks of a folder of prompts
  rename-task, merge             give a task another name; put folders of prompts together
  extract                        the prompts of a run's checkpoint, as a folder
  import-peft, export-peft       prompts from adapters of PEFT, and adapters from prompts
  export-model, export-gguf      a base and its prompts as one model, which any engine serves
  completion                     what a shell needs to complete all this

Every command explains itself with --help, and all but completion print what they did as JSON with --json.
"""
_FLAGS = {"--json", "--chat", "--resume", "--raw"}
# The module of each command. The command's function has the same name, with underscores in place of hyphens.
ROOMS = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), "trainer"),
    "generate": "inference",
    "classify": "inference",
    "distill": "distill",
    "serve": "serve",
    **dict.fromkeys(("inspect", "add-task", "remove-task", "rename-task", "merge", "extract"), "folders"),
    **dict.fromkeys(("import-peft", "export-peft"), "folders"),
    **dict.fromkeys(("export-model", "export-gguf"), "exports"),
    "completion": "completion",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error that the user can correct is printed as one line, with exit status 1.

    Ctrl-C ends with exit status 130, as shells have it for SIGINT.
    """
    arguments = _with_flags(list(sys.argv[1:] if arguments is None else arguments))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if arguments[0] == "--version":
        print(f"lightning-softprompt {__version__}")
        return
    if not arguments[0].startswith("-") and arguments[0] not in ROOMS:
        print(f"error: there is no command {arguments[0]!r}; commands: {', '.join(ROOMS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        _run(arguments)
    except KeyboardInterrupt as error:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from error
    except OSError as error:  # for example a file that does not exist
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SoftPromptError):
            cause = cause.__cause__  # jsonargparse wraps errors that a class raises when it is made
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(1) from error


def function_of(name: str) -> Callable[..., Any]:
    """The function of a command, except those of the Trainer; its arguments are the command's options."""
    room = import_module(f"lightning_softprompt.cli.{ROOMS[name]}")
    function: Callable[..., Any] = getattr(room, name.replace("-", "_"))
    return function


def _run(arguments: list[str]) -> None:
    name, rest = arguments[0], arguments[1:]
    if ROOMS.get(name, "trainer") == "trainer":  # an option before any command is the Trainer's
        from lightning_softprompt.cli import trainer

        trainer.run(arguments)
    else:
        from jsonargparse import auto_cli

        auto_cli(function_of(name), args=rest, as_positional=False, prog=f"lightning-softprompt {name}")


def _with_flags(arguments: list[str]) -> list[str]:
    """The arguments with `=true` added to each flag that has no value, so that `--json` means `--json=true`."""
    following = [*arguments, "--"][1:]
    return [
        f"{argument}=true" if argument in _FLAGS and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]
