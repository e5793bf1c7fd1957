"""Engine clients of a fake engine, and what they are told."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.live_requests import Piece
from paged_backend.messages import Prompt
from paged_backend.request import SamplingParams
from tests.server import fake_engine

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]


TOKENIZER = fake_engine.make_tokenizer()


@contextmanager
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder while it is open: socket addresses end at 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def connect(key: str, num_front_ends: int = 1, model: str = "fake", **options: Any) -> EngineClient:
    client = EngineClient.connect(EngineConfig(model=model, **options), key, num_front_ends, COMMAND)
    client.start(lambda stats: None)
    return client


def connect_all(key: str, num_front_ends: int, model: str = "fake", **options: Any) -> list[EngineClient]:
    """At the same time, as instances initialise."""
    with ThreadPoolExecutor(num_front_ends) as threads:
        return list(threads.map(lambda _: connect(key, num_front_ends, model, **options), range(num_front_ends)))


def close_all(clients: list[EngineClient]) -> None:
    """One after another, as instances are finalized."""
    for client in clients:
        client.close()


def prompt(text: str, **sampling: object) -> Prompt:
    params = SamplingParams(**{"max_tokens": 64, **sampling})  # type: ignore[arg-type]
    return Prompt(np.array(TOKENIZER.encode(text).ids, np.int32), params, ())


class Inbox:
    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.finished = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None:
            self.finished.set()

    @property
    def ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.token_ids]


def ask(client: EngineClient, text: str, **sampling: object) -> tuple[int, Inbox]:
    inbox = Inbox()
    return client.submit(prompt(text, **sampling), "", time.monotonic(), inbox), inbox


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Generous: a new process takes seconds on a busy machine. What must be quick is measured where it is claimed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def engine_pid(client: EngineClient) -> int:
    return client.engine_pid
