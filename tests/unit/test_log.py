"""Logs name classes and positions, never what a patient's file holds."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from readroom.errors import ImageError
from readroom.log import describe_error, set_up_logging

SECRET = "SECRETNAME^CANARY"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook
    stream = io.StringIO()
    set_up_logging("DEBUG", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks


def raise_secret() -> None:
    raise ValueError(f"bad value {SECRET}")


def test_traceback_of_a_foreign_exception_holds_its_class_and_place_only(stream: io.StringIO) -> None:
    try:
        raise_secret()
    except ValueError:
        logging.getLogger("readroom.test").exception("reading failed")
    text = stream.getvalue()
    assert SECRET not in text
    assert "ValueError" in text
    assert "raise_secret" in text


def test_an_error_that_nobody_caught_is_reported_without_its_text(stream: io.StringIO) -> None:
    try:
        raise_secret()
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    text = stream.getvalue()
    assert SECRET not in text
    assert "ValueError" in text and "raise_secret" in text


def test_an_error_that_ends_a_thread_is_reported_without_its_text(
    stream: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    for work in (raise_secret, sys.exit):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    text = stream.getvalue()
    assert SECRET not in text + capfd.readouterr().err
    assert "ValueError" in text and "raise_secret" in text
    assert "SystemExit" not in text


def test_foreign_exception_as_an_argument_is_reduced_to_its_class(stream: io.StringIO) -> None:
    logging.getLogger("readroom.test").warning("failed: %s", ValueError(SECRET))
    assert "failed: ValueError\n" in stream.getvalue()


def test_our_own_errors_keep_their_text(stream: io.StringIO) -> None:
    error = ImageError("truncated", "fewer bytes than rows and columns need")
    logging.getLogger("readroom.test").warning("failed: %s", error)
    assert "truncated: fewer bytes" in stream.getvalue()
    assert describe_error(error).startswith("ImageError")


def test_libraries_that_quote_files_are_silent(stream: io.StringIO) -> None:
    for name in ("pydicom", "PIL.TiffImagePlugin", "sqlalchemy.engine.Engine", "sqlalchemy.pool.impl.QueuePool"):
        logging.getLogger(name).error("quoted %s", SECRET)
    assert stream.getvalue() == ""
