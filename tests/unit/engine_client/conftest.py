"""Where the engines of these tests meet their front ends."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.engine_client.clients import short_folder


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with short_folder(monkeypatch) as path:
        yield path


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex
