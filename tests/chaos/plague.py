"""What befalls engines from outside: signals, some of them while an engine still loads."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paged_backend.process_id import ProcessId
from tests.e2e.test_rank_deaths import children_of

DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
_STOP_SHARE = 0.15
_EARLY_SHARE = 0.1  # of the moments at which engines that still load are struck, too: all of them, and none would serve
_FOR_EVER_SHARE = 0.3  # of the stops: the watchdog must end those


class Diary:
    """The register of engines (chaotic_engine.py), as far as it was read."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.engines: list[ProcessId] = []  # that were alive when they were last looked at
        self.ready: set[int] = set()  # pids of those that have loaded
        self._path, self._at = path, 0

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open() as file:
            file.seek(self._at)
            for line in file.read().splitlines(keepends=True):
                if line.endswith("\n"):
                    self._at += len(line.encode())
                    self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "fault" in line:
            self.faults.append(line["fault"])
        elif "ready" in line:
            self.ready.add(line["ready"])
        elif "born" in line:
            born = ProcessId.of(line["born"])
            self.engines += [] if born is None else [born]
            self.counts["engines"] += 1
        elif not line.keys() & {"engine", "rank"}:  # forked by the nursery
            self.counts.update(line)


class Plague:
    """Signals at random moments. Kills counts processes that ended by them: a signal that finds nobody is none."""

    def __init__(self, diary: Diary, every: float, chance: random.Random) -> None:
        self.signals: Counter[str] = Counter()
        self.deadly_times: list[float] = []  # time.monotonic() of what ends an engine, in order
        self._diary, self._every, self._chance = diary, every, chance
        self._victims: list[ProcessId] = []  # engines that are ending

    @property
    def kills(self) -> int:
        return len(self.deadly_times)

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Until it is over, or cancelled: who is still there then is to be served."""
        while not is_over():
            await asyncio.sleep(self._chance.expovariate(1 / self._every))
            self._diary.read()
            alive = self._diary.engines = [engine for engine in self._diary.engines if engine.alive]
            self._victims = [engine for engine in self._victims if engine in alive]
            early = self._chance.random() < _EARLY_SHARE
            engines = [
                engine for engine in alive if engine not in self._victims and (early or engine.pid in self._diary.ready)
            ]
            if engines:
                await self._strike(self._chance.choice(engines))

    async def _strike(self, engine: ProcessId) -> None:
        """One of its ranks."""
        chance, pid = self._chance, self._chance.choice([engine.pid, *sorted(children_of(engine.pid))])
        rank = "" if pid == engine.pid else " of another rank"
        try:
            if chance.random() >= _STOP_SHARE:
                what = chance.choice(DEADLY)
                os.kill(pid, what)
                self._note(engine, f"{what.name}{rank}")
                return
            os.kill(pid, signal.SIGSTOP)
            if chance.random() < _FOR_EVER_SHARE:
                self._note(engine, f"SIGSTOP for ever{rank}")
                return
            self.signals["SIGSTOP"] += 1
            await asyncio.sleep(chance.uniform(0.05, 1.0))
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def _note(self, engine: ProcessId, name: str) -> None:
        self.signals[name] += 1
        self._victims.append(engine)
        self.deadly_times.append(time.monotonic())
