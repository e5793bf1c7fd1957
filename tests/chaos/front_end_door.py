"""Asking front ends without a server around them: what is served by `paged_backend.frontend.front_end` and below,
through a real engine process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from paged_backend.config import EngineConfig
from paged_backend.engine_client import starter as engine_starter
from paged_backend.engine_client import supervisor as engine_supervisor
from paged_backend.errors import RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.front_end import FrontEnd
from paged_backend.frontend.metrics import Series
from paged_backend.frontend.request_reader import read_request
from tests.chaos.judge import Heard
from tests.server.calls import tensor_array

STANDBY_AFTER_SECONDS = 0.5  # so that some engines have one when they die, and others do not
# before an engine that died soon is started again: paged waits for up to 5 s, and a campaign wants many deaths
LONGEST_PAUSE_SECONDS = 0.2


class Visit:
    """One request as its caller sees it. `send` and `is_cancelled` are what Triton Server offers; that no one asks
    after the end is checked here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, slow: float, note: Callable[[], None]) -> None:
        self.heard = Heard()
        self.left = False
        self._ending = False
        self.news = asyncio.Event()
        self._loop, self._slow, self._note = loop, slow, note

    def send(self, deltas: tuple[Delta, ...], final: bool) -> None:
        """On a sender thread, as a blocking round trip to the server."""
        self._ending = self._ending or final
        if self._slow:
            time.sleep(self._slow)
        self._loop.call_soon_threadsafe(self._take, deltas, final)

    def is_cancelled(self) -> bool:
        if self._ending:
            self.heard.after_final += 1  # Triton Server 2.51 crashes if it is asked then
        return self.left

    def _take(self, deltas: tuple[Delta, ...], final: bool) -> None:
        heard = self.heard
        heard.after_final += bool(heard.finals)
        heard.finals += final
        for delta in deltas:
            if delta.error is not None:
                heard.error = str(delta.error)
            else:
                chosen = [next(iter(entry.values())) for entry in delta.logprobs]
                heard.add(delta.index, delta.text, list(delta.token_ids), chosen, delta.finish_reason)
                if delta.prompt is not None:
                    heard.prompts.append(
                        [
                            {token: entry[0] for token, entry in place.items()}
                            for place in delta.prompt.entries()
                            if place is not None
                        ]
                    )
        self._note()
        self.news.set()


class FrontEndDoor:
    """Several front ends of one engine, in this process."""

    transports = ("direct",)
    broken: list[dict[str, Any]] = []  # there is no server that could break

    def __init__(self, options: dict[str, Any], instances: int, command: list[str] | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp")
        tempfile.tempdir = self._folder.name
        engine_starter.STANDBY_AFTER_SECONDS = STANDBY_AFTER_SECONDS
        engine_supervisor._LONGEST_PAUSE_SECONDS = LONGEST_PAUSE_SECONDS
        config, key = EngineConfig.parse(options), uuid.uuid4().hex
        with ThreadPoolExecutor(instances) as threads:
            self._front_ends = list(threads.map(lambda _: FrontEnd(config, key, instances, command), range(instances)))
        self._turn = count()
        self._values: dict[str, float] = {}
        self._gauges: dict[int, dict[Series, float]] = {}  # by replica

    async def ask(
        self,
        tensors: dict[str, Any],
        parameters: dict[str, Any],
        *,
        note: Callable[[], None],
        stream: bool = True,
        leave_after: float = 0.0,
        leave_at: int = 0,
        slow: float = 0.0,
        transport: str = "direct",
        disconnect: bool = False,
    ) -> Heard:
        visit = Visit(asyncio.get_running_loop(), slow, note)
        wanted = {"stream": stream, "exclude_input_in_output": True, "return_output_ids": True}
        arrays = {name: tensor_array(name, value) for name, value in {**wanted, **tensors}.items()}
        front_end = self._front_ends[next(self._turn) % len(self._front_ends)]
        try:
            request = read_request(arrays, json.dumps(parameters), time.monotonic())
        except RequestError as error:
            front_end.refuse(error, visit.send)
        else:
            front_end.ask(request, visit.send, visit.is_cancelled)
        started = time.monotonic()
        while not visit.heard.finals:
            remaining = leave_after - (time.monotonic() - started) if leave_after and not visit.left else None
            try:
                await asyncio.wait_for(visit.news.wait(), remaining)
            except asyncio.TimeoutError:
                visit.left = True
            visit.news.clear()
            if leave_at and visit.heard.num_tokens >= leave_at:
                visit.left = True
        heard = visit.heard
        if visit.left and "cancelled" in heard.error:  # everybody who leaves gets a final response, and nobody hears it
            heard.error, heard.finals = "", 0
        return heard

    def numbers(self) -> dict[str, float]:
        """As tests.server.calls.metrics reads them from /metrics."""
        for front_end in self._front_ends:
            drained = front_end.tally.drain()
            self._gauges |= drained.gauges
            for (name, label), value in drained.increments.items():
                self._values[f"{name}/{label}"] = self._values.get(f"{name}/{label}", 0.0) + value
        gauges: Counter[str] = Counter()  # of all replicas together
        for of_replica in self._gauges.values():
            for (name, label), value in of_replica.items():
                gauges[f"{name}/{label}"] += value
        return self._values | gauges

    def memory(self) -> dict[str, int]:
        """Of the front ends: they live in this process. Their metrics are fetched first, as a server does all the time:
        they pile up until somebody does.
        """
        self.numbers()
        return own_memory(os.getpid())

    def alive(self) -> bool:
        return all(front_end.alive for front_end in self._front_ends)

    async def revive(self) -> None:
        """Nothing to do: there is no server."""

    def close(self) -> list[str]:
        """Returns what was left behind."""
        for front_end in self._front_ends:
            front_end.close(5)
        left = [path.name for path in Path(self._folder.name).iterdir()]
        tempfile.tempdir = None
        self._folder.cleanup()
        return left


def own_memory(pid: int) -> dict[str, int]:
    """resident: bytes; files: open descriptors; threads."""
    gc.collect()
    status = Path(f"/proc/{pid}/statm").read_text().split()
    return {
        "resident": int(status[1]) * 4096,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }
