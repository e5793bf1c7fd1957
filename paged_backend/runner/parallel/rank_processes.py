"""Rank 0's side of tensor parallelism: it starts the other ranks as its children, sends them every batch, and ends when
one of them does.

Nothing here imports torch: children are started before rank 0 has imported it, so that all of them do so at once.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from paged_backend.batch import AdapterUse, Batch, StepResult
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.runner.parallel.batch_codec import encode_batch
from paged_backend.runner.parallel.channel import Sender

if TYPE_CHECKING:
    from paged_backend.runner.model_runner import ModelRunner

_EXIT_SECONDS = 10.0
_BLAME_SECONDS = 2.0  # from a failure until it is known that a rank has ended

log = logging.getLogger("paged")


class RankStart(msgspec.Struct, frozen=True):
    """What a rank must know to load, beyond the options."""

    folder: str  # the engine's
    model_folder: str  # the checkpoint's: rank 0 has fetched it
    eos_ids: tuple[int, ...]


class RankProcesses:
    """The ranks 1 … size - 1. They die with this process, or with the thread of it that made this; none outlives it by
    more than the time of its own exit. And it ends with any of them, also a standby, which would be of no use without.
    """

    def __init__(
        self, config: EngineConfig, model_name: str = "paged", on_death: Callable[[], None] | None = None
    ) -> None:
        """model_name: for their log lines. on_death: called, on a thread of its own, when one of them has ended
        although nobody asked it to; None: this process ends.

        Raises:
            EngineError: a process cannot be started.
        """
        self.size = config.tensor_parallel_size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._senders: list[Sender] = []
        self._closing = False
        self._on_death = on_death or end_engine
        self._death = ""  # the first that was noticed, in words
        self._died = threading.Event()
        options = config.model_dump_json().encode()
        for rank in range(1, self.size):
            mine, theirs = socket.socketpair()
            with theirs:
                self._processes.append(_spawn(rank, theirs.fileno(), model_name))
            self._senders.append(Sender(mine))
            with suppress(OSError):  # it has ended already: whoever watches it finds out
                self._senders[-1].send(options)
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def start(self, start: RankStart) -> None:
        """Lets them load.

        Raises:
            OSError: a rank has gone.
        """
        self.send(msgspec.msgpack.encode(start))

    def send(self, message: bytes) -> None:
        """
        Raises:
            OSError: a rank has gone.
        """
        self.send_each(lambda rank: message)

    def send_each(self, message_of: Callable[[int], bytes]) -> None:
        """To every other rank its own.

        Raises:
            OSError: a rank has gone.
        """
        for rank, sender in enumerate(self._senders, 1):
            sender.send(message_of(rank))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What fails within because a rank has ended is said of that rank: a library knows only of a closed connection,
        and may know it sooner. Usually this process has ended then, and nothing is said at all.

        Raises:
            EngineError: a rank has ended.
        """
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            if not self._died.wait(_BLAME_SECONDS):
                raise
            raise EngineError(self._death) from error

    def close(self) -> None:
        """Ends them and waits for their exit."""
        self._closing = True
        for sender in self._senders:
            sender.close()
        for process in self._processes:
            try:
                process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closing:
            self._death = self._death or f"rank {rank} (process {process.pid}) ended {_exit_words(status)}"
            log.error("error: %s: so does the engine", self._death)
            self._died.set()
            self._on_death()


class LeadingRunner:
    """Rank 0's runner: what it launches, the other ranks are told of first. Results are its own alone."""

    def __init__(self, runner: ModelRunner, others: RankProcesses) -> None:
        self._runner, self._others = runner, others

    def launch(self, batch: Batch) -> None:
        """
        Raises:
            EngineError: a rank has gone.
        """
        with self._others.blamed():
            if any(isinstance(ask, AdapterUse) and ask.arrivals for ask in batch.asks):
                self._others.send_each(lambda rank: encode_batch(_part_of(batch, rank)))
            else:
                self._others.send(encode_batch(batch))
            self._runner.launch(batch)

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        """
        Raises:
            EngineError: a rank has gone.
        """
        with self._others.blamed():
            yield from self._runner.finished(keep)


def _part_of(batch: Batch, rank: int) -> Batch:
    """As another rank is sent it: of adapters its part."""

    def part(adapter: Any) -> Any:  # models/adapter_files.py's Adapter: rank 0 has all parts of each
        return adapter.part_of(rank)

    asks = tuple(
        replace(ask, arrivals=tuple((slot, part(adapter)) for slot, adapter in ask.arrivals))
        if isinstance(ask, AdapterUse)
        else ask
        for ask in batch.asks
    )
    return replace(batch, asks=asks)


def end_engine() -> None:
    """Ends this process at once, whatever its main thread waits for: front ends start the next engine and resume every
    request.
    """
    logging.shutdown()
    os._exit(1)


def _spawn(rank: int, descriptor: int, model_name: str) -> subprocess.Popen[bytes]:
    # as for the engine: its working directory is no place to import from
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    command = [
        sys.executable,
        *safe_path,
        "-m",
        "paged_backend.runner.parallel.rank_process",
        str(rank),
        str(descriptor),
        str(os.getpid()),
        model_name,
    ]
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[descriptor])
    except OSError as error:
        raise EngineError(f"rank {rank} cannot be started: {os.strerror(error.errno or 0)}") from None


def _exit_words(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with status {status}"
