"""A front end's side of the engine: submits requests, hands each request its tokens; and when the engine dies, goes on
with the next.

connected --the engine dies--> waiting for the next --Ready--> connected: every live request is submitted again
                                    |
                                    +--too many deaths, or unloaded--> gone: every live request ends with an error
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from itertools import count
from pathlib import Path

import msgspec
import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.engine_client.live_requests import LiveRequest, LiveRequests, Receiver, lose, pieces_of
from paged_backend.engine_client.supervisor import EngineSupervisor
from paged_backend.errors import EngineError
from paged_backend.messages import Failed, FromEngine, Prompt, Ready, Stats, Submit, Tokens, request_id_of

log = logging.getLogger("paged")


class EngineClient:
    """Thread-safe, except that `receive` and the callbacks of `start` are called on one thread of the client's own,
    which it owns.
    """

    def __init__(
        self,
        config: EngineConfig,
        key: str,
        num_front_ends: int,
        command: Sequence[str] | None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """Use `connect`; or call `meet`. numbers: of the requests, as many as are asked for."""
        self._config = config
        self._closing = threading.Event()
        self._supervisor = EngineSupervisor(config, key, num_front_ends, command, self._closing)
        self._live = LiveRequests(config.max_queue_size)
        self._numbers = count() if numbers is None else numbers
        self._thread: threading.Thread | None = None
        # called once among all front ends, when there will be no engine any more
        self.on_loss: Callable[[], None] = lambda: None
        self.on_gone: Callable[[], None] = lambda: None  # called in each front end then
        # called before: may give the requests to others, and returns those that nobody has taken
        self.heir: Callable[[list[LiveRequest]], list[LiveRequest]] = lambda requests: requests
        self._on_stats: Callable[[Stats], None]
        self._on_restart: Callable[[], None]
        self._on_inherit: Callable[[], None]
        self._together: Callable[[], AbstractContextManager[None]]
        self.ready: Ready

    @classmethod
    def connect(
        cls, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None = None
    ) -> EngineClient:
        """Finds the engine of the front ends that share `key`, or starts it; returns when it is ready to serve. Then
        call `start`.

        command: how to start the engine, for tests; the folder of the sockets is appended.

        Raises:
            EngineError: the engine cannot start; the sentence is the engine's own, or says how its process ended.
        """
        client = cls(config, key, num_front_ends, command)
        client.meet()
        return client

    def meet(self) -> None:
        """Returns when the engine is ready.

        Raises:
            EngineError: see `connect`; the client is closed.
        """
        try:
            link, self.ready = self._supervisor.meet_first()
        except EngineError as error:
            reason = str(error)
            heard = self._supervisor.end(reason)  # another front end may have heard more
            self.close()
            raise EngineError(heard or reason) from None
        except BaseException:
            self.close()
            raise
        self._live.connect(link)

    def start(
        self,
        on_stats: Callable[[Stats], None],
        on_restart: Callable[[], None] = lambda: None,
        on_inherit: Callable[[], None] = lambda: None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Begins to receive. In the front end that owns the engine, on_stats is called with the engine's numbers a few
        times a second, and on_restart whenever another engine is started in a dead one's place. on_inherit: this front
        end owns the engine from now on. together: around the pieces of one message, which go to many receivers.
        """
        self._on_stats, self._on_restart, self._on_inherit = on_stats, on_restart, on_inherit
        self._together = together
        self._thread = threading.Thread(target=self._receive, name="engine-receive", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False when there is no engine and will be none. While one is restarted, requests are taken and wait."""
        return self._live.open

    @property
    def num_waiting(self) -> int:
        """Requests that wait in the engine, of all front ends, as of its last step; 0 while there is none."""
        return 0 if self._live.link is None else self._supervisor.num_waiting

    @property
    def readies(self) -> list[Ready]:
        """Of the only replica."""
        return [self.ready]

    @property
    def connected(self) -> bool:
        """There is an engine at the moment."""
        return self._live.link is not None

    @property
    def num_under_way(self) -> int:
        """Requests that run or wait in the engine, of all front ends, as of its last step; at least those of this
        one.
        """
        return max(len(self._live), self._supervisor.num_waiting + self._supervisor.num_running)

    def engine_folder(self) -> Path:
        """Of the newest engine."""
        return self._supervisor.engine_folder

    @property
    def front_end(self) -> int:
        return self._supervisor.front_end

    @property
    def engine_pid(self) -> int:
        return self._supervisor.engine_pid

    def submit(
        self,
        prompt: Prompt,
        cache_salt: str,
        arrival: float,
        receive: Receiver,
        family: int | None = None,
        *,
        traced: bool = False,
    ) -> int:
        """Gives a request to the engine; every piece of its answer goes to `receive`, the last one with a `finish`.
        Returns the request's id.

        traced: its first piece says when the engine let it in.

        Raises:
            RequestError: the engine is gone; or it is being restarted, and as many requests wait for it as the queue
                holds.
        """
        request_id = request_id_of(self.front_end, next(self._numbers))
        sampling = prompt.sampling
        # drawn here, so that another engine can go on with the same random numbers
        if sampling.seed is None and not sampling.greedy:
            sampling = msgspec.structs.replace(sampling, seed=self._own_seed(request_id))
        allowed = b"" if prompt.allowed is None else prompt.allowed.tobytes()
        token_ids, num_answered = prompt.token_ids, 0
        if prompt.answer_ids is not None:
            token_ids, num_answered = np.concatenate([token_ids, prompt.answer_ids]), len(prompt.answer_ids)
        submit = Submit(
            request_id,
            token_ids.tobytes(),
            sampling,
            prompt.bad_words,
            cache_salt,
            arrival,
            family,
            num_answered,
            allowed=allowed,
            traced=traced,
        )
        self._live.submit(submit, receive)
        return request_id

    def abort(self, request_id: int) -> None:
        """The request's pages are freed, and nothing more is heard of it. No effect if it is over already."""
        self._live.abort(request_id)

    def adopt(self, live: LiveRequest) -> int:
        """Goes on with a request of another engine's client. Returns its id here.

        Raises:
            RequestError: the engine is gone.
        """
        live.submit = msgspec.structs.replace(
            live.submit, request_id=request_id_of(self.front_end, next(self._numbers))
        )
        self._live.adopt(live)
        return live.submit.request_id

    def tells_loss(self) -> bool:
        """True in one front end of all, the first that asks: it says that the model has no engine any more."""
        return not self._closing.is_set() and self._supervisor.tells_loss()

    def close(self) -> None:
        """Says goodbye; the engine's owner ends the engine and waits for its exit, at most 10 s. No effect the second
        time.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._live.shut()
        if self._thread is None:
            self._leave()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def _leave(self) -> None:
        self._supervisor.close(self._live.disconnect())

    def _own_seed(self, request_id: int) -> int:
        return int.from_bytes(blake2b(f"{self._config.seed}/{request_id}".encode(), digest_size=8).digest(), "little")

    # ---- what the engine says

    def _receive(self) -> None:
        """The receive thread."""
        try:
            while not self._closing.is_set() and self.alive:
                reason = self._listen()
                if reason is not None:
                    self._survive(reason)
        except Exception as error:  # whatever it was, nobody may wait for ever
            log.exception("the engine's messages cannot be read")
            self._lose(str(error))
        self._closing.wait()  # the kernel ends a standby with the thread that started it
        self._leave()

    def _listen(self) -> str | None:
        """Until the engine is gone: why. None when closing."""
        link, heard = self._live.link, time.monotonic()
        assert link is not None
        while not self._closing.is_set():
            self._supervisor.stand_by()
            if self._supervisor.inherit():
                self._on_inherit()
            message = link.next_message()
            if message is not None:
                heard = time.monotonic()
                if isinstance(message, Failed):
                    return message.message
                self._take(message)
            elif not self._supervisor.engine_runs():
                while (message := link.next_message(wait=False)) is not None:  # its last words
                    self._take(message)
                return f"its process ended {self._supervisor.exit_words()}"
            elif self._supervisor.owner and 0 < self._config.engine_hang_seconds < time.monotonic() - heard:
                return f"it said nothing for {self._config.engine_hang_seconds:g} s (engine_hang_seconds)"
        return None

    def _take(self, message: FromEngine) -> None:
        match message:
            case Tokens():
                try:
                    pieces = pieces_of(message)
                except (ValueError, IndexError) as error:
                    log.warning("a message that no engine writes is dropped: %s", error)
                    return
                with self._together():
                    self._live.hand_out(pieces)
            # another may be told before the owner has said hello; counters must not be added up twice
            case Stats() if self._supervisor.owner:
                self._on_stats(message)

    # ---- when it is gone

    def _survive(self, reason: str) -> None:
        """Another engine, and every live request goes on in it; or the end of all of them."""
        died = time.monotonic()
        while True:
            link = self._live.disconnect()
            if link is not None:
                link.close()
                self._live.note_death(*self._supervisor.last_running())
            if self._supervisor.owner:
                log.error(
                    "error: the engine%s died: %s; %s", self._replica_words(), reason, self._supervisor.restart_words()
                )
            try:
                if not self._supervisor.next_engine():
                    self._lose(reason)
                    return
                if self._supervisor.owner:
                    self._on_restart()
                link, self.ready = self._supervisor.meet_next()
                break
            except EngineError as error:
                if self._closing.is_set():
                    return
                reason = str(error)
        self._live.connect(link)
        if self._supervisor.owner:
            log.warning("the engine%s is back after %.1f s", self._replica_words(), time.monotonic() - died)

    def _lose(self, reason: str) -> None:
        """There is none, and there will be none."""
        self._live.shut()
        lose(self.heir(self._live.take_all()))
        # else another front end has said so already
        if not self._closing.is_set() and self._supervisor.end(reason) is None:
            log.error("error: there is no engine any more%s: %s", self._replica_words(), reason)
            self.on_loss()
        self.on_gone()

    def _replica_words(self) -> str:
        return f" of replica {self._config.replica}" if self._config.replicas > 1 else ""
