"""A front end's side of the engine: starts or finds it, submits requests, hands each request its tokens; and when the engine dies, goes on with the next.

A live request is kept here with the tokens it got, and tokens follow from a request and its seed alone. So whoever survives the engine can ask the next
one to go on where the last one stopped, and the caller sees a pause. The front end that started the engine restarts it, the others wait for that.

    connected --the engine dies--> waiting for the next --Ready--> connected: every live request is submitted again
                                        |
                                        +--too many deaths, or unloaded--> gone: every live request ends with an error

A request that runs in death after death may be their cause. It is submitted as a suspect, which the engine runs beside no other suspect (suspects.py);
if engines die of it even so, it ends with an error and nobody else does.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from paged_backend.config import EngineConfig
from paged_backend.election import Election, Incarnation
from paged_backend.engine_link import EngineLink
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.messages import (
    CLEARED_AFTER_TOKENS,
    QUEUE_FILE,
    RUNNING_FILE,
    SUSPECT_FILE,
    Abort,
    Failed,
    FromEngine,
    Goodbye,
    Ready,
    Shutdown,
    Stats,
    Submit,
    Tokens,
    request_id_of,
)
from paged_backend.prompt import Prompt
from paged_backend.request import Finish, Found, PromptLogprobs

_LINGER_MS = 1000  # for the last goodbye
_PATIENCE_SECONDS = 1.0  # Triton Server finalizes instances one after another: the other front ends may say goodbye only after the owner is gone
_EXIT_SECONDS = 10.0
_RESTART_WINDOW_SECONDS = 600.0  # max_engine_restarts counts within it
_QUICK_DEATH_SECONDS = 30.0  # after the restart before; the next restart then waits a little
_LONGEST_PAUSE_SECONDS = 5.0
_LOAD_PATIENCE = 4.0  # times the first load: a restart that takes longer hangs, if that is more than engine_hang_seconds
_SUSPECT_AFTER = 2  # deaths in a row while a request ran
_GUILTY_AFTER = 3  # deaths in a row while it ran as the only suspect; engines may die of something else, too
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
    prompts: list[PromptLogprobs] = field(default_factory=list)
    found: Found | None = None  # a beam search's whole answer, with the finish
    finish: Finish | None = None


Receiver = Callable[[Piece], None]


@dataclass
class _Live:
    """A request until its finish, with all that another engine must know to go on with it."""

    submit: Submit
    receive: Receiver
    sent: bool  # an engine had it
    token_ids: list[int] = field(default_factory=list)  # the answer so far
    num_resumed: int = 0  # of them, how many there were when the present engine began
    deaths: int = 0  # in a row, of engines that ran it
    strikes: int = 0  # deaths while it ran as a suspect

    def resumed(self) -> Submit:
        """The request as the next engine is to be asked."""
        self.num_resumed = len(self.token_ids)
        prompt_ids = self.submit.prompt_ids + np.array(self.token_ids, np.int32).tobytes()
        resumed, self.sent = self.sent, True
        suspect = self.deaths >= _SUSPECT_AFTER
        return msgspec.structs.replace(self.submit, prompt_ids=prompt_ids, num_answered=len(self.token_ids), resumed=resumed, suspect=suspect)


def engine_command() -> list[str]:
    """How the engine process is started; the folder of its sockets is appended."""
    python = sys.executable if sys.executable and Path(sys.executable).is_file() else shutil.which("python3")
    if not python:
        raise EngineError("no Python interpreter found to start the engine with: put python3 on PATH")
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []  # the server's working directory is no place to import from
    return [python, *safe_path, "-m", "paged_backend.engine_process"]


class EngineClient:
    """Thread-safe, except that `receive` and the callbacks of `start` are called on one thread of the client's own."""

    def __init__(self, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None) -> None:
        """Use `connect`."""
        self._config = config
        self._command = command
        self._engine: subprocess.Popen[bytes] | None = None  # the engine process, if this front end owns it
        self._election = Election(key, num_front_ends)
        self._seat = self._election.take_seat(self._start_engine)
        self._incarnation = self._seat.first
        self._live: dict[int, _Live] = {}
        self._serials = count()
        self._lock = threading.Lock()  # of what is live, of the link and of `alive`
        self._alive = True
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: EngineLink | None = None  # None: there is no engine at the moment
        self._queue: NDArray[np.int64] | None = None  # of the newest engine, in memory that it shares
        self._load_seconds = 0.0  # how long the first load took, or what was seen of it
        self._restarts: deque[float] = deque()  # when the last ones were
        self.ready: Ready

    @classmethod
    def connect(cls, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None = None) -> EngineClient:
        """Finds the engine of the front ends that share `key`, or starts it; returns when it is ready to serve. Then call `start`.

        command: how to start the engine, for tests; the folder of the sockets is appended.

        Raises:
            EngineError: the engine cannot start; the sentence is the engine's own, or says how its process ended.
        """
        client = cls(config, key, num_front_ends, command)
        try:
            started = time.monotonic()
            client._link, client.ready = client._meet(client._incarnation)
            client._load_seconds = time.monotonic() - started
        except EngineError as error:
            reason = str(error)
            heard = client._election.end(client._seat, reason)  # another front end may have heard more
            client.close()
            raise EngineError(heard or reason) from None
        except BaseException:
            client.close()
            raise
        return client

    def start(self, on_stats: Callable[[Stats], None], on_restart: Callable[[], None] = lambda: None) -> None:
        """Begins to receive. In the front end that owns the engine, on_stats is called with the engine's numbers a few times a second, and on_restart
        whenever another engine is started in a dead one's place."""
        self._thread = threading.Thread(target=self._receive, args=(on_stats, on_restart), name="engine-receive", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False when there is no engine and will be none. While one is restarted, requests are taken and wait."""
        return self._alive

    @property
    def num_waiting(self) -> int:
        """Requests that wait in the engine, of all front ends, as of its last step; 0 while there is none."""
        queue = self._queue
        return 0 if queue is None or self._link is None else int(queue[0])

    @property
    def front_end(self) -> int:
        return self._seat.front_end

    @property
    def engine_pid(self) -> int:
        return self._incarnation.engine.pid

    def submit(self, prompt: Prompt, cache_salt: str, arrival: float, receive: Receiver, family: int | None = None) -> int:
        """Gives a request to the engine; every piece of its answer goes to `receive`, the last one with a `finish`. Returns the request's id.

        Raises:
            RequestError: the engine is gone; or it is being restarted, and as many requests wait for it as the queue holds.
        """
        request_id = request_id_of(self._seat.front_end, next(self._serials))
        sampling = prompt.sampling
        if sampling.seed is None and not sampling.greedy:  # drawn here, so that another engine can go on with the same random numbers
            sampling = msgspec.structs.replace(sampling, seed=self._own_seed(request_id))
        allowed = b"" if prompt.allowed is None else prompt.allowed.tobytes()
        submit = Submit(request_id, prompt.token_ids.tobytes(), sampling, prompt.bad_words, cache_salt, arrival, family, allowed=allowed)
        with self._lock:
            if not self._alive or self._closing.is_set():
                raise RequestError(ENGINE_GONE, ErrorKind.OVERLOADED)
            if self._link is None and len(self._live) >= self._config.max_queue_size:
                waiting = f"{len(self._live)} requests wait for the engine, which is being restarted"
                raise RequestError(f"{waiting}; the limit is {self._config.max_queue_size} (max_queue_size)", ErrorKind.OVERLOADED)
            self._live[request_id] = _Live(submit, receive, sent=self._link is not None)
            if self._link is not None:
                self._link.send(submit)
        return request_id

    def abort(self, request_id: int) -> None:
        """The request's pages are freed, and nothing more is heard of it. No effect if it is over already."""
        with self._lock:
            if self._live.pop(request_id, None) is not None and self._link is not None:
                self._link.send(Abort(request_id))

    def close(self) -> None:
        """Says goodbye; the engine's owner ends the engine and waits for its exit, at most 10 s. No effect the second time."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._engine is not None:
            self._election.end(self._seat)
        with self._lock:
            self._alive = False
            link, self._link = self._link, None
        if link is not None:
            link.send(Goodbye(self._seat.front_end))
            if self._engine is not None:
                link.send(Shutdown(_PATIENCE_SECONDS))
            link.close(_LINGER_MS if self._engine_runs() else 0)
        elif self._engine is not None:
            self._engine.kill()  # it was still loading
        if self._engine is not None:
            _wait_for_exit(self._engine)
        self._context.term()
        self._election.leave(self._seat)

    def _own_seed(self, request_id: int) -> int:
        return int.from_bytes(blake2b(f"{self._config.seed}/{request_id}".encode(), digest_size=8).digest(), "little")

    # ---- one engine

    def _start_engine(self, folder: Path) -> int:
        self._engine = _start_engine([*(self._command or engine_command()), str(folder)], self._config)
        return self._engine.pid

    def _load_patience(self) -> float:
        """Seconds that a restart may take; only who can do something about it loses patience."""
        hang_seconds = self._config.engine_hang_seconds
        return max(hang_seconds, _LOAD_PATIENCE * self._load_seconds) if self._seat.owner and hang_seconds > 0 else math.inf

    def _meet(self, incarnation: Incarnation, patience: float = math.inf) -> tuple[EngineLink, Ready]:
        """Says hello and waits as long as the engine's process lives, `patience` seconds at most: a large model takes minutes to load.

        Raises:
            EngineError: why it cannot serve; or this front end is closing.
        """
        self._incarnation = incarnation
        link = EngineLink(self._context, self._seat.folder_of(incarnation), self._seat.front_end)
        started = time.monotonic()
        try:
            while not self._closing.is_set():
                message = link.next_message()
                if isinstance(message, Ready):
                    self._queue = _open_queue(self._seat.folder_of(incarnation) / QUEUE_FILE)
                    return link, message
                if isinstance(message, Failed):
                    raise EngineError(message.message)
                if message is None and not self._engine_runs() and (message := link.next_message(0)) is None:
                    raise EngineError(f"the engine process ended {self._exit_words()} before it was ready; its log lines say why")
                if message is None and time.monotonic() > started + patience:
                    raise EngineError(f"it was not ready after {patience:.0f} s")
            raise EngineError("the model is being unloaded")
        except BaseException:
            link.close()
            raise

    def _engine_runs(self) -> bool:
        if self._engine is not None:
            return self._engine.poll() is None
        return self._incarnation.engine.alive

    def _exit_words(self) -> str:
        if self._engine is None or self._engine.returncode is None:
            return "by itself"
        code = self._engine.returncode
        return f"by signal {-code}" if code < 0 else f"with status {code}"

    # ---- what it says

    def _receive(self, on_stats: Callable[[Stats], None], on_restart: Callable[[], None]) -> None:
        """The receive thread."""
        try:
            while not self._closing.is_set() and self._alive:
                reason = self._listen(on_stats)
                if reason is not None:
                    self._survive(reason, on_restart)
        except Exception as error:  # whatever it was, nobody may wait for ever
            log.exception("the engine's messages cannot be read")
            self._lose(str(error))

    def _listen(self, on_stats: Callable[[Stats], None]) -> str | None:
        """Until the engine is gone: why. None when closing."""
        link, heard = self._link, time.monotonic()
        assert link is not None
        while not self._closing.is_set():
            message = link.next_message()
            if message is not None:
                heard = time.monotonic()
                if isinstance(message, Failed):
                    return message.message
                self._take(message, on_stats)
            elif not self._engine_runs():
                while (message := link.next_message(0)) is not None:  # its last words
                    self._take(message, on_stats)
                return f"its process ended {self._exit_words()}"
            elif self._seat.owner and 0 < self._config.engine_hang_seconds < time.monotonic() - heard:
                return f"it said nothing for {self._config.engine_hang_seconds:g} s (engine_hang_seconds)"
        return None

    def _take(self, message: FromEngine, on_stats: Callable[[Stats], None]) -> None:
        match message:
            case Tokens():
                self._hand_out(message)
            case Stats() if self._seat.owner:  # another may be told before the owner has said hello; counters must not be added up twice
                on_stats(message)

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
        for prompt in tokens.prompts:
            pieces.setdefault(prompt.request_id, Piece()).prompts.append(prompt)
        for found in tokens.found:
            pieces.setdefault(found.request_id, Piece()).found = found
        for finish in tokens.finishes:
            pieces.setdefault(finish.request_id, Piece()).finish = finish
        for request_id, piece in pieces.items():
            self._deliver(request_id, piece)

    def _deliver(self, request_id: int, piece: Piece) -> None:
        with self._lock:
            live = self._live.pop(request_id, None) if piece.finish is not None else self._live.get(request_id)
        if live is None:
            return  # aborted: the engine had not heard of it yet
        live.token_ids += piece.token_ids
        if live.deaths and len(live.token_ids) >= live.num_resumed + CLEARED_AFTER_TOKENS:
            live.deaths = live.strikes = 0
        try:
            live.receive(piece)
        except Exception:  # one request's trouble must not silence the others
            log.exception("a request's receiver failed")
            self.abort(request_id)

    # ---- when it is gone

    def _survive(self, reason: str, on_restart: Callable[[], None]) -> None:
        """Another engine, and every live request goes on in it; or the end of all of them."""
        died = time.monotonic()
        while True:
            with self._lock:
                link, self._link = self._link, None
            if link is not None:
                link.close()
                self._note_death()
            if self._seat.owner:
                log.error("error: the engine stopped: %s", reason)
            try:
                incarnation = self._next_engine()
                if incarnation is None:
                    self._lose(reason)
                    return
                if self._seat.owner:
                    on_restart()
                link, self.ready = self._meet(incarnation, self._load_patience())
                break
            except EngineError as error:
                if self._closing.is_set():
                    return
                reason = str(error)
        self._resume(link)
        if self._seat.owner:
            log.warning("the engine is back after %.1f s", time.monotonic() - died)

    def _next_engine(self) -> Incarnation | None:
        """Started if this front end owns the engine, awaited if not. None: there will be none."""
        if self._engine is not None:
            return self._restart()
        while not self._closing.wait(0.05):
            current = self._election.current(self._seat)
            if current is None or current.number > self._incarnation.number:
                return current
        return None

    def _restart(self) -> Incarnation | None:
        assert self._engine is not None
        self._engine.kill()
        _wait_for_exit(self._engine)
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > _RESTART_WINDOW_SECONDS:
            self._restarts.popleft()
        if len(self._restarts) >= self._config.max_engine_restarts:
            log.error("error: %d restarts within %.0f s (max_engine_restarts): no more", len(self._restarts), _RESTART_WINDOW_SECONDS)
            return None
        num_quick = sum(now - restart < _QUICK_DEATH_SECONDS for restart in self._restarts)
        if num_quick and self._closing.wait(min(0.1 * 2**num_quick, _LONGEST_PAUSE_SECONDS)):
            return None
        self._restarts.append(time.monotonic())
        return self._election.restart(self._seat, self._start_engine)

    def _note_death(self) -> None:
        """Who was there when it happened?"""
        folder = self._seat.folder_of(self._incarnation)
        named, running = _read(folder / SUSPECT_FILE).decode(), _read(folder / RUNNING_FILE)
        running_ids = set(np.frombuffer(running[: len(running) // 8 * 8], np.int64).tolist())
        guilty = []
        with self._lock:
            for request_id, live in self._live.items():
                if request_id not in running_ids:
                    continue
                live.deaths += 1
                live.strikes += named == str(request_id)
                if live.strikes >= _GUILTY_AFTER:
                    guilty.append(request_id)
        for request_id in guilty:
            message = f"the engine died {_GUILTY_AFTER} times while it ran this request alone among those that were running when it died before"
            self._deliver(request_id, Piece(finish=Finish(request_id, "", ErrorKind.INTERNAL, message)))

    def _resume(self, link: EngineLink) -> None:
        with self._lock:
            for live in self._live.values():
                link.send(live.resumed())
            self._link = link

    def _lose(self, reason: str) -> None:
        """Every live request ends with one clear error."""
        with self._lock:
            self._alive = False
            request_ids = list(self._live)
        if not self._closing.is_set() and self._election.end(self._seat, reason) is None:  # else another front end has said so already
            log.error("error: there is no engine any more: %s", reason)
        for request_id in request_ids:
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


def _open_queue(path: Path) -> NDArray[np.int64] | None:
    try:
        return np.memmap(path, np.int64, "r", shape=1)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


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
