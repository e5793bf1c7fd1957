"""A front end's side of the engine: starts or finds it, submits requests, hands each request its tokens, notices the engine's death."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import zmq

from paged_backend.config import EngineConfig
from paged_backend.election import Election, Seat
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.messages import (
    Abort,
    Failed,
    FromEngine,
    Goodbye,
    Hello,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    decode_from_engine,
    encode,
    request_id_of,
)
from paged_backend.prompt import Prompt
from paged_backend.request import Finish

_POLL_MS = 100  # how soon a silent death is noticed
_LINGER_MS = 1000  # for the last goodbye
_PATIENCE_SECONDS = 1.0  # Triton Server finalizes instances one after another: the other front ends may say goodbye only after the owner is gone
_EXIT_SECONDS = 10.0
ENGINE_GONE = "the engine stopped; try again later"

log = logging.getLogger("paged")


@dataclass
class Piece:
    """What one message brought for one request: tokens, and at its end a `Finish`.

    The Finish of a request comes in the message of its last token.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)  # per token, the chosen one first; empty if not asked for
    num_cached_tokens: int | None = None  # with the first token
    finish: Finish | None = None


Receiver = Callable[[Piece], None]


@dataclass(frozen=True)
class _Live:
    submit: Submit  # kept for the day an engine is restarted and its requests are submitted again
    receive: Receiver


def engine_command() -> list[str]:
    """How the engine process is started; the folder of its sockets is appended."""
    python = sys.executable if sys.executable and Path(sys.executable).is_file() else shutil.which("python3")
    if not python:
        raise EngineError("no Python interpreter found to start the engine with: put python3 on PATH")
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the server's working directory is no place to import from
    return [python, *safe_path, "-m", "paged_backend.engine_process"]


class EngineClient:
    """Thread-safe, except that `receive` and `on_stats` are called on one thread of the client's own."""

    def __init__(self, election: Election, seat: Seat, engine: subprocess.Popen[bytes] | None) -> None:
        """Use `connect`. engine: the engine process if this front end owns it."""
        self._election = election
        self._seat = seat
        self._engine = engine
        self._live: dict[int, _Live] = {}
        self._serials = count()
        self._lock = threading.Lock()  # of the sending socket and of `alive`
        self._alive = True
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self.ready: Ready

    @classmethod
    def connect(cls, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None = None) -> EngineClient:
        """Finds the engine of the front ends that share `key`, or starts it; returns when it is ready to serve. Then call `start`.

        command: how to start the engine, for tests; the folder of the sockets is appended.

        Raises:
            EngineError: the engine cannot start; the sentence is the engine's own, or says how its process ended.
        """
        election = Election(key, num_front_ends)
        started: list[subprocess.Popen[bytes]] = []

        def start(folder: Path) -> int:
            started.append(_start_engine([*(command or engine_command()), str(folder)], config))
            return started[0].pid

        seat = election.take_seat(start)
        client = cls(election, seat, started[0] if started else None)
        try:
            client.ready = client._say_hello()
        except BaseException:
            client.close()
            raise
        return client

    def start(self, on_stats: Callable[[Stats], None]) -> None:
        """Begins to receive. on_stats: called with the engine's numbers a few times a second, in the front end that owns the engine."""
        self._thread = threading.Thread(target=self._receive, args=(on_stats,), name="engine-receive", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def front_end(self) -> int:
        return self._seat.front_end

    def submit(self, prompt: Prompt, cache_salt: str, arrival: float, receive: Receiver, family: int | None = None) -> int:
        """Gives a request to the engine; every piece of its answer goes to `receive`, the last one with a `finish`. Returns the request's id.

        Raises:
            RequestError: the engine is gone.
        """
        request_id = request_id_of(self._seat.front_end, next(self._serials))
        submit = Submit(request_id, prompt.token_ids.tobytes(), prompt.sampling, prompt.bad_words, cache_salt, arrival, family)
        with self._lock:
            if not self._alive or self._closing.is_set():
                raise RequestError(ENGINE_GONE, ErrorKind.OVERLOADED)
            self._live[request_id] = _Live(submit, receive)
            self._outbox.send(encode(submit))
        return request_id

    def abort(self, request_id: int) -> None:
        """The request's pages are freed, and nothing more is heard of it. No effect if it is over already."""
        if self._live.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    def close(self) -> None:
        """Says goodbye; the engine's owner ends the engine and waits for its exit, at most 10 s. No effect the second time."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._engine is not None:
            self._election.end(self._seat)
        self._send(Goodbye(self._seat.front_end))
        if self._engine is not None:
            self._send(Shutdown(_PATIENCE_SECONDS))
        with self._lock:
            self._alive = False
            self._outbox.close(linger=_LINGER_MS if self._engine_runs() else 0)
        self._inbox.close(linger=0)
        if self._engine is not None:
            _wait_for_exit(self._engine)
        self._context.term()
        self._election.leave(self._seat)

    def _send(self, message: ToEngine) -> None:
        with self._lock:
            if self._alive:
                self._outbox.send(encode(message))

    def _say_hello(self) -> Ready:
        """Waits as long as the engine's process lives: a large model takes minutes to load."""
        address = f"ipc://{self._seat.folder}/front_end_{self._seat.front_end}.sock"
        self._inbox.bind(address)
        self._outbox.connect(f"ipc://{self._seat.folder}/engine.sock")
        self._send(Hello(self._seat.front_end, address))
        while True:
            message = self._next_message()
            if isinstance(message, Ready):
                return message
            if isinstance(message, Failed):
                self._election.end(self._seat, message.message)
                raise EngineError(message.message)
            if message is None and not self._engine_runs() and not self._inbox.poll(0):
                reason = f"the engine process ended {self._exit_words()} before it was ready; its log lines say why"
                raise EngineError(self._election.end(self._seat, reason) or reason)  # another front end may have heard more

    def _next_message(self) -> FromEngine | None:
        """None if nothing came for a while."""
        return decode_from_engine(self._inbox.recv()) if self._inbox.poll(_POLL_MS) else None

    def _engine_runs(self) -> bool:
        if self._engine is not None:
            return self._engine.poll() is None
        return self._seat.engine.alive

    def _exit_words(self) -> str:
        return f"with status {self._engine.returncode}" if self._engine is not None else "by itself"

    def _receive(self, on_stats: Callable[[Stats], None]) -> None:
        """The receive thread."""
        try:
            self._receive_until_closed(on_stats)
        except Exception as error:  # whatever it was, nobody may wait for ever
            log.exception("the engine's messages cannot be read")
            self._lose(str(error))

    def _receive_until_closed(self, on_stats: Callable[[Stats], None]) -> None:
        while not self._closing.is_set() and self._alive:
            message = self._next_message()
            match message:
                case Tokens():
                    self._hand_out(message)
                case Stats() if self._seat.owner:  # another may be told before the owner has said hello; counters must not be added up twice
                    on_stats(message)
                case Failed():
                    self._lose(message.message)
                case None:
                    if not self._engine_runs() and not self._inbox.poll(0):
                        self._lose(f"its process ended {self._exit_words()}")

    def _hand_out(self, tokens: Tokens) -> None:
        pieces: dict[int, Piece] = {}
        request_ids: list[int] = np.frombuffer(tokens.request_ids, np.int64).tolist()
        token_ids: list[int] = np.frombuffer(tokens.token_ids, np.int32).tolist()
        logprobs: list[float] = np.frombuffer(tokens.logprobs, np.float32).tolist()
        for entry, (request_id, token_id) in enumerate(zip(request_ids, token_ids, strict=True)):
            piece = pieces.get(request_id)
            if piece is None:
                piece = pieces[request_id] = Piece()
            piece.token_ids.append(token_id)
            if logprobs:
                top = tokens.top_logprobs.get(entry, {})
                piece.logprobs.append({token_id: logprobs[entry]} | {other: logprob for other, logprob in top.items() if other != token_id})
        for request_id, num_cached_tokens in tokens.started.items():
            pieces.setdefault(request_id, Piece()).num_cached_tokens = num_cached_tokens
        for finish in tokens.finishes:
            pieces.setdefault(finish.request_id, Piece()).finish = finish
        for request_id, piece in pieces.items():
            self._deliver(request_id, piece)

    def _deliver(self, request_id: int, piece: Piece) -> None:
        live = self._live.pop(request_id, None) if piece.finish is not None else self._live.get(request_id)
        if live is None:
            return  # aborted: the engine had not heard of it yet
        try:
            live.receive(piece)
        except Exception:  # one request's trouble must not silence the others
            log.exception("a request's receiver failed")
            self.abort(request_id)

    def _lose(self, reason: str) -> None:
        """Every live request ends with one clear error. (A later version starts another engine and submits them again.)"""
        with self._lock:
            self._alive = False
        if self._election.end(self._seat) is None:  # else its end was wanted, or another front end has said so already
            log.error("error: the engine stopped: %s", reason)
        for request_id in list(self._live):
            self._deliver(request_id, Piece(finish=Finish(request_id, "", ErrorKind.OVERLOADED, ENGINE_GONE)))


def _start_engine(command: list[str], config: EngineConfig) -> subprocess.Popen[bytes]:
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
    except OSError as error:
        raise EngineError(f"the engine process cannot be started: {os.strerror(error.errno or 0)}") from None
    assert process.stdin is not None
    try:
        process.stdin.write(config.model_dump_json().encode() + b"\n")
        process.stdin.flush()  # and stays open: its end tells the engine that we are gone
    except BrokenPipeError:
        pass  # it died already; whoever waits for Ready finds out
    return process


def _wait_for_exit(engine: subprocess.Popen[bytes]) -> None:
    started = time.monotonic()
    try:
        engine.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        log.error("error: the engine did not stop within %.0f s: killed", time.monotonic() - started)
        engine.kill()
        engine.wait()
    if engine.stdin is not None:
        engine.stdin.close()
