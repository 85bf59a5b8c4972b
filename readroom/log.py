"""Logging that cannot name a patient.

Our own messages hold ids and codes only. What other libraries say may quote file contents (pydicom does), so of a
foreign exception only the class and the code positions are written, never its text.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from readroom.errors import ReadroomError

logger = logging.getLogger(__name__)

QUOTING_LOGGERS = ("pydicom", "PIL", "highdicom", "sqlalchemy.engine", "sqlalchemy.pool", "asyncio")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class PrivateFormatter(logging.Formatter):
    """Writes exceptions without the texts of foreign exceptions."""

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802 - logging's own name
        """Frames as file, line and function; the exception's class; its text only when it is ours."""
        kind, error, trace = ei
        frames = [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(trace)]
        return "\n".join([*frames, describe_error(error) if error else str(kind)])


class PrivateFilter(logging.Filter):
    """Drops exception objects from message arguments, where `%s` would print their text."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace each exception among the arguments by its safe description; keep the record."""
        if isinstance(record.args, tuple):
            record.args = tuple(describe_error(a) if isinstance(a, BaseException) else a for a in record.args)
        return True


def describe_error(error: BaseException) -> str:
    """The class of an error, with its text when the error is one of ours."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, ReadroomError) else name


def set_up_logging(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (default: standard error) through the private formatter, uncaught errors too."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(PrivateFormatter(FORMAT))
    handler.addFilter(PrivateFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    silence_quoting()
    sys.excepthook = report_uncaught
    threading.excepthook = report_thread


def report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of the interpreter's own report, which quotes the texts of the error and of those that led to it."""
    logger.critical("an error that nobody caught", exc_info=(kind, error, trace))


def report_thread(arguments: threading.ExceptHookArgs) -> None:
    """The same for an error that ended a thread."""
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        report_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def silence_quoting() -> None:
    """Mute libraries whose messages quote file contents, and quieten one that tells its own set-up."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in QUOTING_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
