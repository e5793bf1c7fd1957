"""What a failed test's server wrote belongs to the failure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from paged_backend.server.launch import Server

_LINES = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"last lines of {name}'s log", "\n".join(value.log_lines()[-_LINES:])))
    return report
