"""What reaches a terminal."""

from __future__ import annotations

import logging
import warnings

import pytest

from lightning_softprompt.cli.terminal import in_one_line, print_error, printable, quiet_libraries, quiet_loggers

ATTACK = "a\x1b]0;title\x07b\x9b31m\r\nc"


def test_no_control_character_of_a_file_is_printed(capsys) -> None:
    assert in_one_line(ATTACK) == r"a\x1b]0;title\x07b\x9b31m c"
    assert printable(ATTACK) == "a\\x1b]0;title\\x07b\\x9b31m\\r\nc"
    print_error(f"details\nerror: {ATTACK}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["details", r"error: a\x1b]0;title\x07b\x9b31m c"]
    assert len(in_one_line("x" * 5000)) < 2100


def test_what_is_logged_of_a_file_is_printed_without_them(caplog) -> None:
    logger = logging.getLogger("lightning_softprompt")
    with quiet_libraries():
        logger.warning("the row %s", "\x1b[31m")
    logger.warning("the row %s", "\x1b[31m")
    assert [record.getMessage() for record in caplog.records] == [r"the row \x1b[31m", "the row \x1b[31m"]


@pytest.mark.filterwarnings("error")
def test_only_warnings_that_somebody_can_act_on_are_shown(capsys) -> None:
    with quiet_libraries():
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", "Found")
        warnings.warn("this is old", DeprecationWarning, stacklevel=1)
        warnings.warn("Some weights were not\ninitialized", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: Some weights were not initialized\n"
    with pytest.raises(DeprecationWarning):  # as before
        warnings.warn("this is old", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("name", ["lightning.pytorch", "lightning.fabric"])
def test_advertisements_are_left_out(name: str) -> None:
    logger, said = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with quiet_loggers():
            logger.warning("Tip: install litlogger")
            logger.warning("`Trainer.fit` stopped")
    finally:
        logger.removeHandler(handler)
    assert said == ["`Trainer.fit` stopped"] and not handler.filters
