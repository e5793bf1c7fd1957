"""What one file of ours has logged, for tests: pytest's `caplog` has the records of every library and of threads that
earlier tests left, too.
"""

from __future__ import annotations

import pytest


def lines_logged_by(module: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages that the file `module`.py logged, in their order. A record counts once, also where pytest listens to
    our logger and to the root.
    """
    records = {id(record): record for record in caplog.records}
    return [record.getMessage() for record in records.values() if record.module == module]
