"""The engine process: `python -m paged_backend.engine.process --model-name=NAME DIRECTORY`, one for all front ends of a
model.

Started by a front end (engine_client/starter.py) with the options as one JSON line on stdin. With `--standby` after the
folder it imports what an engine needs and waits for another line. From then on it lives as long as any front end does
(life_line.py), not only the one that started it. Messages (messages.py) come in at `ipc://DIRECTORY/engine.sock`; each
front end is answered at the address it said hello with. `paged top` finds this process by its command line and its
name, and subscribes at `ipc://DIRECTORY/watch.sock` (snapshot_publisher.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from paged_backend.batch import StepOutput
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.front_end_deaths import FrontEndDeaths
from paged_backend.engine.snapshot_publisher import Watch
from paged_backend.errors import EngineError, reason_of
from paged_backend.life_line import live_by
from paged_backend.log_lines import LogLines
from paged_backend.messages import (
    ENGINE_NAME,
    ENGINE_SOCKET,
    MODEL_NAME,
    QUEUE_FILE,
    REPLICA,
    RUNNING_FILE,
    STANDBY,
    SUSPECT_FILE,
    Abort,
    Failed,
    FeatureOutput,
    Finish,
    Found,
    FromEngine,
    Goodbye,
    Hello,
    Ready,
    Shutdown,
    Submit,
    ToEngine,
    Tokens,
    decode_to_engine,
    encode,
    front_end_of,
    front_ends_of,
)
from paged_backend.process_id import ProcessId
from paged_backend.runner.parallel.rank_processes import RankProcesses
from paged_backend.scheduler.scheduler import Scheduler

_STATS_SECONDS = 0.25
_IDLE_WAIT_SECONDS = 0.05
_STALLED_WAIT_SECONDS = 0.002
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

log = logging.getLogger("paged")


class Inbox:
    """What front ends say, in order of arrival."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(address)

    def drain(self) -> Iterator[ToEngine]:
        """Every message that has arrived; never waits."""
        while self._socket.poll(0):
            received = self._socket.recv()
            try:
                yield decode_to_engine(received)
            except msgspec.DecodeError as error:
                log.warning("%d bytes that are no message of a front end are dropped: %s", len(received), error)

    def wait(self, seconds: float) -> bool:
        """True when a message has arrived, False after `seconds`."""
        return bool(self._socket.poll(int(seconds * 1000)))


class Outbox:
    """One PUSH socket per front end. Unbounded and never waiting: a slow front end holds up nobody (the streamer bounds
    what it keeps).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    @property
    def front_ends(self) -> list[int]:
        return sorted(self._sockets)

    def __contains__(self, front_end: int) -> bool:
        return front_end in self._sockets

    def connect(self, front_end: int, address: str) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(address)
        self._sockets[front_end] = socket

    def disconnect(self, front_end: int, linger_ms: int | None = None) -> None:
        """linger_ms: how long what was sent may still take to leave; None: as long as usual."""
        socket = self._sockets.pop(front_end, None)
        if socket is not None:
            socket.close(linger_ms)

    def send(self, front_end: int, message: FromEngine) -> None:
        socket = self._sockets.get(front_end)
        if socket is not None:
            socket.send(encode(message))

    def put(self, output: StepOutput) -> None:
        """Tells each front end what the step brought for its own requests."""
        owners = front_ends_of(output.request_ids)
        for front_end in self._sockets:
            mine: NDArray[np.bool_] = owners == front_end
            finishes = tuple(finish for finish in output.finishes if front_end_of(finish.request_id) == front_end)
            outputs = tuple(one for one in output.feature_outputs if front_end_of(one.request_id) == front_end)
            if finishes or outputs or mine.any():
                self.send(front_end, _tokens(output, mine, outputs, finishes))


def _tokens(
    output: StepOutput, mine: NDArray[np.bool_], outputs: tuple[FeatureOutput, ...], finishes: tuple[Finish, ...]
) -> Tokens:
    """The part of an output that belongs to one front end."""
    request_ids = output.request_ids[mine]
    answered = {*request_ids.tolist(), *(one.request_id for one in outputs if isinstance(one, Found))}
    started = {key: value for key, value in output.started.items() if key in answered} if output.started else {}
    admitted = {key: value for key, value in output.admitted.items() if key in answered} if output.admitted else {}
    tops = {}
    if output.top_logprobs:
        tops = {
            position: output.top_logprobs[entry]
            for position, entry in enumerate(np.flatnonzero(mine).tolist())
            if entry in output.top_logprobs
        }
    return Tokens(
        request_ids=request_ids.tobytes(),
        token_ids=output.token_ids[mine].tobytes(),
        logprobs=b"" if output.logprobs is None else output.logprobs[mine].tobytes(),
        ranks=b"" if output.ranks is None else output.ranks[mine].tobytes(),
        top_logprobs=tops,
        started=started,
        admitted=admitted,
        feature_outputs=outputs,
        finishes=finishes,
    )


class EngineProcess:
    """The loop: messages in, a step, tokens out. Ends on Shutdown, once nobody waits for anything or patience is
    over.
    """

    def __init__(self, directory: Path, model: str = "") -> None:
        """model: its name, for those who watch."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context = context
        self._directory = directory
        self._model = model
        # bound before the slow load: nobody's hello is lost
        self._inbox = Inbox(context, f"ipc://{directory}/{ENGINE_SOCKET}")
        self._outbox = Outbox(context)
        self._deaths = FrontEndDeaths()
        self._end_by: float | None = None
        self._next_stats = 0.0

    def run(self, load: Callable[[Path], tuple[Engine, Scheduler, Ready]]) -> int:
        """Loads and serves. Returns the exit status."""
        try:
            self._engine, scheduler, self._ready = load(self._directory)
        except EngineError as error:
            log.error("error: %s", error)
            self._refuse(str(error))
            return 1
        except Exception as error:  # ours to explain: what goes to stderr by itself may be seen by nobody
            reason = f"{type(error).__name__}: {reason_of(error)}"
            log.exception("error: the engine could not start: %s", reason)
            self._refuse(f"the engine could not start: {reason}; its log has the traceback")
            return 1
        scheduler.tell_of_suspects(self._note_suspect)
        scheduler.share_running(self._directory / RUNNING_FILE)
        self._scheduler = scheduler
        self._queue = np.memmap(self._directory / QUEUE_FILE, np.int64, "w+", shape=2)
        self._watch = Watch(self._context, self._directory, self._model, scheduler, self._ready.page_size)
        gc.collect()
        gc.freeze()  # what the load left behind lives as long as the process: no need to look at it again
        while not self._over():
            self._iterate()
        return 0

    def _iterate(self) -> None:
        for message in self._inbox.drain():
            self._receive(message)
        while (dead := self._deaths.next_one()) is not None:
            self._forget_front_end(*dead)
        # front ends look, and spare us and their callers a way that ends in a refusal
        self._queue[:] = self._scheduler.num_waiting, self._scheduler.num_running
        spare_time_used = self._engine.use_spare_time()
        if self._engine.idle:
            if self._inbox.wait(0 if spare_time_used else _IDLE_WAIT_SECONDS):
                return  # the rest has time, the caller's first token has not
        else:
            for output in self._engine.step():
                self._outbox.put(output)
                self._watch.note_step(output)
            if self._engine.stalled:
                self._inbox.wait(_STALLED_WAIT_SECONDS)
        self._tell_stats()
        self._watch.publish()

    def _receive(self, message: ToEngine) -> None:
        match message:
            case Submit():
                if front_end_of(message.request_id) in self._outbox:  # else it died, and this came late
                    self._engine.submit(message)
                    self._watch.note_request(message)
            case Abort():
                self._engine.abort(message.request_id)
            case Hello():
                self._outbox.connect(message.front_end, message.address)
                self._outbox.send(message.front_end, self._ready)
                if message.process is not None:
                    self._deaths.watch(message.front_end, message.process)
            case Goodbye():
                self._deaths.forget(message.front_end)
                self._outbox.disconnect(message.front_end)
            case Shutdown():
                self._end_by = time.monotonic() + message.patience_seconds

    def _forget_front_end(self, front_end: int, process: ProcessId) -> None:
        """Nobody listens for its requests any more: their pages are freed."""
        self._outbox.disconnect(front_end, linger_ms=0)
        request_ids = {
            sequence.request_id
            for sequence in self._scheduler.sequences
            if front_end_of(sequence.request_id) == front_end
        }
        for request_id in request_ids:
            self._engine.abort(request_id)
        log.error(
            "error: front end %d (process %d) died: %d requests of its callers are lost, their pages free",
            front_end,
            process.pid,
            len(request_ids),
        )

    def _note_suspect(self, request_id: int | None) -> None:
        """For those who ask, should this process die now."""
        (self._directory / SUSPECT_FILE).write_text("" if request_id is None else str(request_id))

    def _over(self) -> bool:
        return self._end_by is not None and (self._engine.idle or time.monotonic() > self._end_by)

    def _tell_stats(self) -> None:
        """To one front end: they publish to the same series, and counters would add up."""
        now = time.monotonic()
        if now >= self._next_stats and self._outbox.front_ends:
            self._next_stats = now + _STATS_SECONDS
            self._outbox.send(self._outbox.front_ends[0], self._engine.stats())

    def _refuse(self, sentence: str) -> None:
        """Tells every front end that says hello within two seconds why there is no engine; later ones find the process
        gone.
        """
        end = time.monotonic() + 2
        while time.monotonic() < end:
            self._inbox.wait(0.1)
            for message in self._inbox.drain():
                if isinstance(message, Hello):
                    self._outbox.connect(message.front_end, message.address)
                    self._outbox.send(message.front_end, Failed(sentence))


def prepare(config: EngineConfig) -> None:
    """What takes seconds of a start and needs neither the device nor much memory. What fails here fails again later,
    when somebody listens.
    """
    gc.disable()  # a seventh of the time goes into looking again and again at modules that stay
    try:
        with contextlib.suppress(Exception):
            from paged_backend.engine.loading import prepare_to_load

            prepare_to_load(config)
    finally:
        gc.enable()


def wait_to_be_engine(
    directory: Path, flags: Collection[str], model_name: str = "paged"
) -> tuple[EngineConfig, RankProcesses | None] | None:
    """The options, and the other ranks if there are to be any, once this process is to be the engine of that folder.
    Until then it dies with its parent, or rather with the thread that started it; from then on with the last front end.
    None: the parent has gone.

    flags: with STANDBY among them it prepares and waits until it is needed. model_name: for the ranks' log lines.

    Raises:
        EngineError: nobody would notice if it were left alone.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent cannot say goodbye
    line = sys.stdin.readline()
    if not line:
        return None
    config = EngineConfig.model_validate_json(line)
    # they import what they need meanwhile
    others = RankProcesses(config, model_name) if config.tensor_parallel_size > 1 else None
    if STANDBY in flags:
        prepare(config)
        if not sys.stdin.readline():
            return None
    live_by(directory)
    prctl(_PR_SET_PDEATHSIG, 0)
    prctl(_PR_SET_NAME, ENGINE_NAME.encode())
    return config, others


def main() -> int:
    # Ctrl-C in a terminal reaches the whole group; the server decides when we end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    names = [word.removeprefix(MODEL_NAME) for word in sys.argv[1:] if word.startswith(MODEL_NAME)]
    directory, *flags = [word for word in sys.argv[1:] if not word.startswith((MODEL_NAME, REPLICA))]
    stderr = logging.StreamHandler()
    model_name = names[-1] if names else "paged"
    stderr.setFormatter(LogLines(model_name))
    logging.basicConfig(level=logging.INFO, handlers=[stderr])
    found = wait_to_be_engine(Path(directory), flags, model_name)
    if found is None:
        return 0
    config, others = found

    def load(folder: Path) -> tuple[Engine, Scheduler, Ready]:
        prepare(config)
        from paged_backend.engine.loading import load_engine
        from paged_backend.runner.placement import leave_a_core

        leave_a_core(os.environ, config.replicas)
        return load_engine(config, folder, others, captures_later=True)

    return EngineProcess(Path(directory), Path(config.model).name).run(load)


def end_with(status_of: Callable[[], int]) -> NoReturn:
    """Ends the process at once: threads that compile a grammar, and libraries with device memory, take long to leave
    and talk about it.
    """
    try:
        status = status_of()
    except BaseException as error:
        log.exception("error: the engine stopped%s", _device_words(error))
        status = 1
    logging.shutdown()
    os._exit(status)


def _device_words(error: BaseException) -> str:
    """What we say ourselves, torch or CUDA: its first line, which quotes no prompt, as other exceptions may."""
    first = (str(error).splitlines() or [""])[0]
    ours = isinstance(error, EngineError) or type(error).__module__.split(".")[0] == "torch"
    return f": {first}" if ours or first.startswith("CUDA") else ""


if __name__ == "__main__":
    end_with(main)
