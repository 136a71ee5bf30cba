"""What reaches a terminal: errors of one line, no control characters of a file, no warnings that nobody can act on."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning_softprompt.prompts.characters import without_control

_LONGEST = 2000
# What Lightning, PyTorch and jsonargparse warn of in every run, where all is as it should be: a frozen base is in eval
# mode, rows are encoded before a loader gets them, and deprecations are for those who write programs.
_CATEGORIES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode at the start of training",
    "No seed found, seed set to",
    "You defined a `validation_step` but have no `val_dataloader`",
    "The '.*_dataloader' does not have many workers",
    "Total length of `list` across ranks is zero",  # no validation rows
    "Trying to infer the `batch_size` from an ambiguous collection",
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "LightningCLI's args parameter is intended to run from within Python",
    "You're using the WeightAveraging callback with a model that overrides the configure_model callback",
)
# Of the callbacks that a checkpoint was made with, which only matter to a run that goes on.
_OF_CALLBACKS = ("Be aware that when using `ckpt_path`, callbacks used to create", "The dirpath has changed from")
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_NOTES = ("Tip:", "litlogger", "TPU available: False", "Loading `train_dataloader` to estimate")


def in_one_line(text: str) -> str:
    """A text of some lines in one, without control characters, and cut where it is very long."""
    line = without_control(re.sub(r"\s*[\r\n\u2028\u2029]+\s*", " ", text.strip()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def print_error(text: str) -> None:
    """Print an error on standard error; the lines in front of its last one are for those who asked for them."""
    *details, last = text.split("\nerror: ")
    for each in details:
        print(printable(each), file=sys.stderr)
    print(f"error: {in_one_line(last)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with its control characters escaped, but for newlines and tabs."""
    return "".join(each if each in "\n\t" else without_control(each) for each in text)


def is_read() -> bool:
    """Whether somebody reads what is printed; False where a pipe has ended, as behind `| head`.

    Where standard output takes nothing more, what is printed goes nowhere from now on, as Python would try again when
    it ends.
    """
    if sys.stdout is None:  # it was closed before the process began
        return True
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return not isinstance(error, BrokenPipeError)
    return True


@contextmanager
def any_characters() -> Iterator[None]:
    """Print as an escape sequence what the encoding of standard output has no character for."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    errors = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # `is_read` has told of it
            out.reconfigure(errors=errors)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep away what libraries say and a user of the command can do nothing about.

    `python -W` and `PYTHONWARNINGS` are the user's own word, and stand.
    """
    own = logging.getLogger("lightning_softprompt")
    own.addFilter(_without_control)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        if not sys.warnoptions:
            for category in _CATEGORIES:
                warnings.simplefilter("ignore", category)
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            own.removeFilter(_without_control)


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Keep away Lightning's advertisements, by its handlers, which there are once it is imported."""
    import lightning.pytorch  # noqa: F401

    handlers = [each for name in _LOGGERS for each in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_is_of_use)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_of_use)


@contextmanager
def quiet_callbacks() -> Iterator[None]:
    """Keep away what Lightning says of a checkpoint's callbacks, where nothing is trained."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for message in _OF_CALLBACKS:
                warnings.filterwarnings("ignore", message)
        yield


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {in_one_line(str(message))}", file=sys.stderr)


def _is_of_use(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(note in text for note in _NOTES)


def _without_control(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True
