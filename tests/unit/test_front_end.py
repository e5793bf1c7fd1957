"""A front end without a server: what it does by itself, with the fake engine behind it."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import ErrorKind
from paged_backend.front_end import FrontEnd
from paged_backend.request import Delta, Outputs, Request, SamplingParams
from tests.server import fake_engine

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[FrontEnd]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # socket addresses end at 107 bytes
        monkeypatch.setattr(tempfile, "tempdir", name)
        front_end = FrontEnd(EngineConfig(model="fake", request_deadline_seconds=50), uuid.uuid4().hex, 1, COMMAND)
        yield front_end
        front_end.close(0)


def test_a_deadline_holds_although_the_engine_says_nothing(front_end: FrontEnd) -> None:
    """It may be restarting, for as long as a large model loads."""
    heard: list[tuple[Delta, bool]] = []
    ended = threading.Event()

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        heard.extend((delta, final) for delta in deltas)
        if final:
            ended.set()

    sampling = SamplingParams(max_tokens=8, request_deadline_seconds=0.1)
    request = Request(text="silent", input_ids=None, sampling=sampling, outputs=Outputs(), stream=True, prepend_prompt=False, arrival=time.monotonic())
    front_end.ask(request, send, lambda: False)
    assert ended.wait(20)
    ((delta, final),) = heard
    assert final
    assert delta.error is not None and delta.error.kind is ErrorKind.CANCELLED
    assert str(delta.error) == "not finished after 0.1 s (request_deadline_seconds)"
