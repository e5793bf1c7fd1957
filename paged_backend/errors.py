"""The two kinds of failure: a caller's mistake or misfortune (`RequestError`), and ours (`EngineError`)."""

from __future__ import annotations

from enum import Enum


class ErrorKind(str, Enum):
    """Why a request failed. `triton_io` translates each to one of Triton Server's error codes, in one place."""

    INVALID = "invalid"  # the caller must change the request
    OVERLOADED = "overloaded"  # the same request may succeed later
    CANCELLED = "cancelled"  # the caller left, or a deadline passed
    INTERNAL = "internal"  # our fault
    UNSUPPORTED = "unsupported"  # this server lacks something that another may have


class RequestError(Exception):
    """One request cannot be served; every other request goes on.

    The message is for the caller: it names the field, the value and the limit, and carries no path and no traceback.
    """

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.INVALID) -> None:
        super().__init__(message)
        self.kind = kind


class EngineError(Exception):
    """The engine cannot start or go on. The message is one sentence for the operator."""


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line: libraries begin their messages with empty lines, and transformers says of a
    module that it cannot be imported, but only in the exception behind it why.
    """
    words = _first_words(error)
    cause = error
    while isinstance(cause, ImportError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return words if cause is error else f"{words} ({type(cause).__name__}: {_first_words(cause)})"


def _first_words(error: BaseException) -> str:
    # which str() would put in quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
