"""The engine process, with mishaps: `python chaotic_engine.py ORDERS DIRECTORY [--standby]`, started like the real one
and made of the same parts.

Pages are refused and memory runs out at random moments, which follow from the seed and the engine's number. Whatever
else goes wrong is written into the register, a line of JSON each: that it was born, that it is ready, mishaps,
and faults, also those of its other ranks. That a rank was ended by a signal is none, nor what an engine ends of then.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged_backend.batch import Batch, StepResult
from paged_backend.engine.engine import Engine, Runner
from paged_backend.engine.process import EngineProcess, wait_to_be_engine
from paged_backend.messages import REPLICA, Ready
from paged_backend.scheduler.page_pool import PagePool
from paged_backend.scheduler.scheduler import Scheduler

_TELL_EVERY_SECONDS = 0.5
ENDED_BY_SIGNAL = "ended by signal"  # in what a rank 0 says of another rank


@dataclass(frozen=True)
class Orders:
    """What goes wrong, and how often; and where it is written down."""

    register: str  # a file
    seed: int = 0
    refuse_pages: float = 0.0  # share of the askings for pages that find none
    out_of_memory: float = 0.0  # share of steps that end the engine like a failed allocation


class Register:
    """Appends lines of JSON to a file that many processes share."""

    def __init__(self, path: str) -> None:
        self._path = path

    def note(self, **line: Any) -> None:
        with Path(self._path).open("a") as file:
            file.write(json.dumps(line) + "\n")


class FaultLog(logging.Handler):
    """Errors that an engine or a rank logs are faults of its own, but for a rank's end by a signal. stderr has all."""

    def __init__(self, register: Register) -> None:
        super().__init__(logging.ERROR)
        self._register = register

    def emit(self, record: logging.LogRecord) -> None:
        words = self.format(record)
        self._register.note(**({"ranks_ended": 1} if ENDED_BY_SIGNAL in words else {"fault": words}))


def listen(register: Register) -> None:
    """Errors of this process are written into the register from now on."""
    log = logging.getLogger("paged")
    log.handlers, log.propagate = [FaultLog(register), logging.StreamHandler()], False


class Mishaps:
    """Stands before the runner, and between the scheduler and its pool. Steps and refusals are told now and then: a
    killed engine has no last word.
    """

    def __init__(self, orders: Orders, number: str, runner: Runner, pool: PagePool, register: Register) -> None:
        self._chance = random.Random(f"{orders.seed}/{number}")
        self._orders, self._runner, self._register = orders, runner, register
        self._steps, self._refusals, self._told = 0, 0, time.monotonic()
        self._take = pool.take
        pool.take = self.take  # type: ignore[method-assign]

    def take(self, n: int) -> list[int] | None:
        if n and self._chance.random() < self._orders.refuse_pages:
            self._refusals += 1
            return None
        return self._take(n)

    def launch(self, batch: Batch) -> None:
        self._runner.launch(batch)
        self._steps += 1
        if time.monotonic() > self._told + _TELL_EVERY_SECONDS:
            self._register.note(steps=self._steps, refused_pages=self._refusals)
            self._steps, self._refusals, self._told = 0, 0, time.monotonic()
        if self._chance.random() < self._orders.out_of_memory:
            raise MemoryError("on purpose")

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        return self._runner.finished(keep)


def run(orders: Orders, directory: Path, flags: Sequence[str] = ()) -> int:
    """An engine's life, from the line on stdin to its end."""
    register = Register(orders.register)
    listen(register)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    found = wait_to_be_engine(directory, flags)
    if found is None:
        return 0
    config, others = found
    number = "/".join(directory.parts[-2:])
    register.note(born=os.getpid(), number=number)

    def load(directory: Path) -> tuple[Engine, Scheduler, Ready]:
        from paged_backend.engine.loading import load_engine

        engine, scheduler, ready = load_engine(config, directory, others)
        engine._runner = Mishaps(orders, number, engine._runner, scheduler.pool, register)
        register.note(ready=os.getpid())
        return engine, scheduler, ready

    try:
        return EngineProcess(directory, "demo").run(load)
    except MemoryError as error:
        if str(error) != "on purpose":
            register.note(fault=traceback.format_exc())
        else:
            register.note(out_of_memory=1)
        return 1
    except BaseException as error:
        if ENDED_BY_SIGNAL not in str(error):
            register.note(fault=traceback.format_exc())
        return 1


def main() -> None:
    directory, *flags = [word for word in sys.argv[2:] if not word.startswith(REPLICA)]
    os._exit(run(Orders(**json.loads(sys.argv[1])), Path(directory), flags))


if __name__ == "__main__":
    main()
