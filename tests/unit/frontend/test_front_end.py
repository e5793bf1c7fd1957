"""A front end without a server: what it does by itself, with the fake engine behind it."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine_client.supervisor import open_queue
from paged_backend.errors import ErrorKind
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.front_end import FrontEnd
from paged_backend.messages import QUEUE_FILE
from paged_backend.request import Outputs, Request, SamplingParams
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
    request = Request(
        text="silent",
        input_ids=None,
        sampling=sampling,
        outputs=Outputs(),
        stream=True,
        prepend_prompt=False,
        arrival=time.monotonic(),
    )
    front_end.ask(request, send, lambda: False)
    assert ended.wait(20)
    ((delta, final),) = heard
    assert final
    assert delta.error is not None and delta.error.kind is ErrorKind.CANCELLED
    assert str(delta.error) == "not finished after 0.1 s (request_deadline_seconds)"


def test_callers_are_asked_whether_they_left_a_thousand_times_a_second_at_most(front_end: FrontEnd) -> None:
    """Each question costs what a third of a response does, and hundreds of streams have better uses for that."""
    num_requests, questions = 300, []
    for number in range(num_requests):
        request = Request(
            text="silent",
            input_ids=None,
            sampling=SamplingParams(max_tokens=8),
            outputs=Outputs(),
            stream=True,
            prepend_prompt=False,
            arrival=time.monotonic(),
        )

        def is_cancelled(number: int = number) -> bool:
            questions.append(number)
            return False

        front_end.ask(request, lambda deltas, final: None, is_cancelled)
    questions.clear()
    time.sleep(1.0)
    num_asked = len(questions)
    assert set(questions) == set(range(num_requests))
    assert num_asked <= 1000 + 2 * num_requests  # a round that was under way, and one before it knew how many there are


def test_prompts_that_are_still_to_be_read_wait_too(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has not heard of them: a flood that comes faster than prompts are read has its bound, too."""
    go_on, refusals = threading.Event(), []
    read = front_end.prompts.read
    monkeypatch.setattr(front_end.prompts, "read", lambda request: (go_on.wait(20), read(request))[1])
    monkeypatch.setattr(front_end, "config", front_end.config.model_copy(update={"max_queue_size": 10}))

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        refusals.extend(delta.error for delta in deltas if delta.error is not None)

    for _ in range(100):
        sampling = SamplingParams(bad_words=("ten",))  # has to be tokenised, too: not done at once
        asked = {"text": "tokens=2", "input_ids": None, "sampling": sampling, "outputs": Outputs()}
        request = Request(**asked, stream=False, prepend_prompt=False, arrival=time.monotonic())
        front_end.ask(request, send, lambda: False)
    go_on.set()
    assert front_end.streamer.wait_until_all_ended(20)
    assert 80 <= len(refusals) <= 90
    assert all("10 requests are waiting, the limit is 10 (max_queue_size)" in str(error) for error in refusals)


def test_a_request_too_many_is_refused_before_its_prompt_is_read(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says how many wait in memory that it shares; it, the tokenizer and their callers are spared the
    rest.
    """
    folder = front_end.client._supervisor.engine_folder
    np.array([front_end.config.max_queue_size, 0], np.int64).tofile(folder / QUEUE_FILE)
    front_end.client._supervisor._queue = open_queue(folder / QUEUE_FILE)
    read: list[object] = []
    monkeypatch.setattr(front_end.prompts, "read", read.append)
    ended, told = threading.Event(), []

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        told.extend(deltas)
        if final:
            ended.set()

    sampling = SamplingParams(max_tokens=8)
    request = Request(
        text="tokens=3",
        input_ids=None,
        sampling=sampling,
        outputs=Outputs(),
        stream=True,
        prepend_prompt=False,
        arrival=time.monotonic(),
    )
    front_end.ask(request, send, lambda: False)
    assert ended.wait(20)
    (delta,) = told
    assert delta.error is not None and delta.error.kind is ErrorKind.OVERLOADED
    assert str(delta.error) == "4096 requests are waiting, the limit is 4096 (max_queue_size)"
    assert not read
