"""How log records are written: each on one line, with its time and the model's name, without what a caller could have
put there.

paged: 2026-11-29T08:05:11.042Z [paged_llm] engine ready after 2.1 s
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from pathlib import Path
from types import TracebackType

_OURS = "paged: "
_STAMP = re.compile(rf"{_OURS}\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z \[[^]]*\] ")


class LogLines(logging.Formatter):
    """`paged: TIME [MODEL] message`, the time in UTC. Characters that could end the line or move a terminal's cursor
    are escaped; of an exception, its type and where it was raised are told and its text is not: it may quote a prompt.
    """

    def __init__(self, model_name: str) -> None:
        """model_name: as clients call the model; two models of one server write to the same log."""
        super().__init__(
            f"{_OURS}%(asctime)s.%(msecs)03dZ [{model_name.replace('%', '%%')}] %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        line = self.formatMessage(record)
        if record.exc_info:
            kind, error, trace = record.exc_info
            line += f": {_explain(kind, error, trace)}"
        return "".join(
            char if char.isprintable() else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
            for char in line
        )


def _explain(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> str:
    """`KeyError (answer.py:118 begin, prompt.py:77 read)`: the outermost place first, the last eight of them; then what
    caused it.
    """
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-8:]]
    reported = f"{kind.__name__ if kind else 'no exception'} ({', '.join(places)})"
    cause = error.__cause__ if error is not None else None
    return reported if cause is None else f"{reported}, from {_explain(type(cause), cause, cause.__traceback__)}"


def without_stamp(line: str) -> str:
    """A line of ours as a person reads it who watches it appear: "paged: message". Other lines stay as they are."""
    return _STAMP.sub(_OURS, line, count=1)
