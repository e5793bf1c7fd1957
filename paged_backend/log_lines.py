"""How log records are written: each on one line, without what a caller could have put there."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import TracebackType


class LogLines(logging.Formatter):
    """`paged: message`. Characters that could end the line or move a terminal's cursor are escaped; of an exception, its type and where it was raised are
    told and its text is not: it may quote a prompt."""

    def __init__(self) -> None:
        super().__init__("paged: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        line = self.formatMessage(record)
        if record.exc_info:
            kind, error, trace = record.exc_info
            line += f": {_explain(kind, error, trace)}"
        return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}" for char in line)


def _explain(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> str:
    """`KeyError (answer.py:118 begin, prompt.py:77 read)`: the outermost place first, the last eight of them; then what caused it."""
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-8:]]
    told = f"{kind.__name__ if kind else 'no exception'} ({', '.join(places)})"
    cause = error.__cause__ if error is not None else None
    return told if cause is None else f"{told}, from {_explain(type(cause), cause, cause.__traceback__)}"
