"""Engines with a simulated runner that tell what they have cached, and the sockets by which routers hear of it."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import zmq

from paged_backend.engine.engine import Engine
from paged_backend.engine.kv_event_publisher import KvEventPublisher
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.kv_events import KvEvents, Note
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.prefix_cache import PrefixCache
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner

SIZE = 4
LIMITS = SchedulerLimits(page_size=SIZE, num_pages=24, max_model_len=64, max_num_sequences=8, max_batched_tokens=32)


class Told:
    """An engine with a simulated runner, and the notes of its steps."""

    def __init__(
        self, steps_ahead: int = 0, limits: SchedulerLimits = LIMITS, publisher: KvEventPublisher | None = None
    ) -> None:
        self.steps: list[list[Note]] = []
        self._publisher = publisher
        self.scheduler = Scheduler(limits)
        runner = SimulatedRunner(
            limits.max_num_sequences,
            limits.num_pages,
            limits.page_size,
            limits.max_model_len,
            limits.max_batched_tokens,
        )
        self.engine = Engine(self.scheduler, runner, steps_ahead, KvEvents(limits.page_size, self._send))
        self._serial = 0

    def _send(self, notes: list[Note]) -> None:
        self.steps.append(notes)
        if self._publisher is not None:
            self._publisher.send(notes)

    def ask(
        self, prompt: list[int], max_tokens: int = 4, salt: str = "", family: int | None = None, **sampling: object
    ) -> None:
        self._serial += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
        self.engine.submit(
            Submit(self._serial, np.array(prompt, np.int32).tobytes(), params, (), salt, time.monotonic(), family)
        )

    def run(self, max_steps: int = 10**6) -> None:
        while not self.engine.idle and max_steps:
            self.engine.step()
            self.engine.check()
            max_steps -= 1

    @property
    def cache(self) -> PrefixCache:
        return self.scheduler._running.pages._cache

    def found(self, prompt: list[int], salt: str = "") -> int:
        """Tokens of the prompt that the engine's own prefix cache would find."""
        hashes: list[bytes] = []
        self.cache.extend(hashes, np.array(prompt, np.int32), len(prompt) // SIZE, f"salt {salt}")
        return len(self.cache.match(hashes)[0]) * SIZE


class Wire:
    """A publisher, and subscribers to it."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.addresses = (f"ipc://{folder}/kv", f"ipc://{folder}/kv.replay")
        self.publisher = KvEventPublisher(self.context, *self.addresses, SIZE)

    def subscriber(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.subscribe(b"")
        socket.connect(self.addresses[0])
        time.sleep(0.1)  # the subscription is on its way
        return socket

    def missed(self, first: int) -> list[tuple[int, list[object]]]:
        """What the replay socket tells from a number on."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(self.addresses[1])
        socket.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            empty, topic, number, body = socket.recv_multipart()
            assert empty == topic == b""
            if not body:
                assert number == b"\xff" * 8
                socket.close(linger=0)
                return batches
            batches.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(body)[1]))

    def close(self) -> None:
        self.publisher.close()
        self.context.destroy(linger=0)
