"""The command line: find the command, run it, and print its errors.

No slow import is made before a command runs, so that `--help` and an unknown command are answered at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lightning_softprompt import __version__
from lightning_softprompt.cli.arguments import flags_and_lists, with_values
from lightning_softprompt.cli.terminal import any_characters, is_read, print_error, quiet_libraries
from lightning_softprompt.errors import SoftPromptError, nearest

_USAGE = """usage: lightning-softprompt COMMAND [--help] [options]

Prompt tuning of a frozen causal LM, many tasks at once.

  fit, validate, test, predict   run a config: lightning-softprompt fit --config run.yaml
                                 (fit leaves the trained prompts in a folder whose name it prints)
  init                           write a commented config from a look at a data file
  generate                       answer the rows of a file with trained prompts
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
An error is one line, with exit status 2 for what cannot be read of the command line or a config, and 1 for the rest;
with --debug it comes with its traceback.
"""
_UNREAD = 141
# The module of each command. The command's function has the same name, with underscores in place of hyphens.
ROOMS = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), "trainer"),
    "init": "init",
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
    """Run the command line. An error is printed as one line; with `--debug`, behind its traceback.

    The exit status is 2 for what cannot be read of the command line or of a config, 1 for any other error, 130 for
    Ctrl-C, as shells have it for SIGINT, and 141 where nobody reads what is printed, as they have it for SIGPIPE.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [argument for argument in given if argument != "--debug"]
    is_debugged = len(arguments) < len(given)
    try:
        with any_characters(), quiet_libraries():
            _run(arguments, is_debugged)
            if sys.stdout is not None:  # it may have been closed before the process began
                sys.stdout.flush()
    except BrokenPipeError as error:
        raise SystemExit(_UNREAD) from error
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Rich ends the process with another status
            raise SystemExit(_UNREAD) from error
        raise
    except KeyboardInterrupt as error:
        print_error("interrupted")
        raise SystemExit(130) from error
    except Exception as error:
        if is_debugged:
            traceback.print_exc()
        print_error(_said(error))
        raise SystemExit(1) from error
    finally:
        if not is_read():
            raise SystemExit(_UNREAD)


def _said(error: BaseException) -> str:
    """What an error says, in words for those who gave the command.

    Any class of error may come out of the libraries underneath. What the library itself or the system says stands as it
    is; before the words of others stands what kind of error it is, and how to see where.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SoftPromptError):
        cause = cause.__cause__  # jsonargparse wraps errors that a class raises when it is made
    if cause is not None or isinstance(error, OSError):  # for example a file that does not exist
        return str(cause or error)
    return f"{str(error).strip() or 'no words'} ({type(error).__name__}; --debug shows where)"


def function_of(name: str) -> Callable[..., Any]:
    """The function of a command, except those of the Trainer; its arguments are the command's options."""
    room = import_module(f"lightning_softprompt.cli.{ROOMS[name]}")
    function: Callable[..., Any] = getattr(room, name.replace("-", "_"))
    return function


def _run(arguments: list[str], is_debugged: bool) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if arguments[0] == "--version":
        print(f"lightning-softprompt {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    if not name.startswith("-") and name not in ROOMS:
        hint = nearest(name, ROOMS)
        print_error(f"there is no command {name!r}; {hint and f'{hint} '}commands: {', '.join(ROOMS)}")
        raise SystemExit(2)
    from lightning_softprompt.cli.usage import OneLine

    OneLine.is_debugged = is_debugged
    if ROOMS.get(name, "trainer") == "trainer":  # an option before any command is the Trainer's
        from lightning_softprompt.cli import trainer

        trainer.run(with_values(arguments, ["--json"]))
        return
    from jsonargparse import auto_cli

    function = function_of(name)
    prepared = with_values(rest, *flags_and_lists(function))
    auto_cli(function, prepared, as_positional=False, parser_class=OneLine, prog=f"lightning-softprompt {name}")
