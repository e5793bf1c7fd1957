"""An engine process without a model, for benchmarks of the front ends: `python paced_engine.py DIRECTORY
--step-ms=20`, spoken to like the real one.

Every step brings each running request a token of the embedded model's vocabulary until it has its max_tokens, drawn at
random, but some as often as words are in a text (Zipf's law): what is remembered of tokens is worth what it is worth
with a model.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from paged_backend.config import demo_model_folder
from paged_backend.life_line import live_by
from paged_backend.messages import (
    Abort,
    Finish,
    Goodbye,
    Hello,
    Ready,
    Shutdown,
    Submit,
    Tokens,
    decode_to_engine,
    encode,
    front_end_of,
)

STEP_OPTION = "--step-ms="
_FIRST_TOKEN, _NUM_TOKENS = 300, 3700  # of the embedded model: no special tokens
_OFTEN = np.cumsum(1 / np.arange(1, _NUM_TOKENS + 1))  # the k-th in 1/k of all places
_READY = Ready(str(demo_model_folder() / "tokenizer.json"), 4096, 2048, 2**20, 16, 2**16)


def likely_tokens(random: np.random.Generator, count: int) -> NDArray[np.int32]:
    """[count] token ids of the embedded model, as often as Zipf's law has them."""
    places = np.searchsorted(_OFTEN, random.random(count) * _OFTEN[-1])
    return (_FIRST_TOKEN + places).astype(np.int32)


class PacedEngine:
    def __init__(self, directory: Path, step_seconds: float) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{directory}/engine.sock")
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._left: dict[int, dict[int, int]] = {}  # front end -> request id -> tokens to come
        self._step_seconds = step_seconds
        self._random = np.random.default_rng(0)
        self._ended = False

    def run(self) -> None:
        due = 0.0
        while not self._ended:
            idle = not any(self._left.values())
            if idle:
                due = time.monotonic()
            if self._inbox.poll(50 if idle else max(0, round(1000 * (due - time.monotonic())))):
                self._receive(decode_to_engine(self._inbox.recv()))
            elif time.monotonic() >= due and not idle:
                due = max(due + self._step_seconds, time.monotonic())
                self._step()

    def _receive(self, message: object) -> None:
        match message:
            case Hello():
                socket = self._outboxes[message.front_end] = self._context.socket(zmq.PUSH)
                socket.set_hwm(0)
                socket.connect(message.address)
                socket.send(encode(_READY))
                self._left[message.front_end] = {}
            case Submit():
                self._left[front_end_of(message.request_id)][message.request_id] = message.sampling.max_tokens or 1
            case Abort():
                self._left[front_end_of(message.request_id)].pop(message.request_id, None)
            case Goodbye():
                self._outboxes.pop(message.front_end).close()
                self._left.pop(message.front_end)
            case Shutdown():
                self._ended = True

    def _step(self) -> None:
        for front_end, left in self._left.items():
            if not left:
                continue
            ids = np.array(list(left), np.int64)
            tokens = likely_tokens(self._random, len(ids))
            finishes = []
            for request_id in left:
                left[request_id] -= 1
                if not left[request_id]:
                    finishes.append(Finish(request_id, "length"))
            for finish in finishes:
                del left[finish.request_id]
            self._outboxes[front_end].send(encode(Tokens(ids.tobytes(), tokens.tobytes(), finishes=tuple(finishes))))


if __name__ == "__main__":
    sys.stdin.readline()  # the options mean nothing here
    (own_folder,) = (word for word in sys.argv[1:] if not word.startswith("--"))
    (step_ms,) = (word.removeprefix(STEP_OPTION) for word in sys.argv[1:] if word.startswith(STEP_OPTION))
    live_by(Path(own_folder))
    PacedEngine(Path(own_folder), float(step_ms) / 1000).run()
