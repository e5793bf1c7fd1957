"""A front end's side of several engines of one model (`replicas`): each has an EngineClient of its own, with election,
standby and live requests, and a request goes to one of them.

To the replica that has most of its prompt in its prefix cache, of equals to the one with the fewest requests under way;
unless it has many more of them than another, which then gets the request. A replica whose engine is being restarted
gets none as long as another serves; what it had goes on in its next engine, or in another replica if there will be
none.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count

from paged_backend.block_hashes import block_hashes_of
from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.known_prefixes import KnownPrefixes
from paged_backend.engine_client.live_requests import LiveRequest, Piece, Receiver
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.messages import REPLICA, Prompt, Ready, Stats, number_of

# requests more than another's that a replica may have for the sake of a prefix, and as a share of the other's
_SLACK_REQUESTS, _SLACK_SHARE = 4, 0.5
_MAX_FAMILIES = 1024  # of which it is remembered where the last one went

log = logging.getLogger("paged")


class Replicas:
    """What EngineClient is to one engine, to all of them: thread-safe, and its callbacks come on the clients' threads,
    with the number of the replica.
    """

    def __init__(self, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None) -> None:
        """Starts all engines that nobody has started yet. Use `connect`."""
        self._clients: list[EngineClient] = []
        self._prefixes: KnownPrefixes | None = None
        self._families: OrderedDict[int, int] = OrderedDict()  # -> the replica that has it
        self._moved: dict[int, int] = {}  # a request's id -> its id in the replica that took it over
        # requests that a replica had which is lost, and which may be on their way to another
        self._aborted: set[int] = set()
        self._settled: set[int] = set()  # lost replicas of which no request is on its way any more
        self._lock = threading.Lock()  # of the four
        self._num_gone = 0
        self.on_loss: Callable[[], None] = lambda: None  # once among all front ends, when no replica is left
        # called in each front end when one of them has no engine any more
        self.on_replica_gone: Callable[[int], None] = lambda replica: None
        try:
            for replica in range(config.replicas):
                self._clients.append(
                    EngineClient(
                        config.model_copy(update={"replica": replica}),
                        f"{key}/{replica}",
                        num_front_ends,
                        command and [*command, f"{REPLICA}{replica}"],
                        count(replica, config.replicas),
                    )
                )
        except BaseException:
            self.close()
            raise
        self._num_asked = count(self.front_end)  # front ends begin with different replicas

    @classmethod
    def connect(
        cls, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None = None
    ) -> Replicas:
        """Finds the engines of the front ends that share `key`, or starts them; returns when all are ready to serve.
        Then call `start`.

        Raises:
            EngineError: one of them cannot start.
        """
        replicas = cls(config, key, num_front_ends, command)
        try:
            for number, client in enumerate(replicas._clients):
                try:
                    client.meet()
                except EngineError as error:
                    raise EngineError(f"replica {number}: {error}") from None
        except BaseException:
            replicas.close()
            raise
        if config.prefix_cache:
            replicas._prefixes = KnownPrefixes([client.engine_folder for client in replicas._clients])
        return replicas

    def start(
        self,
        on_stats: Callable[[Stats, int], None],
        on_restart: Callable[[int], None] = lambda replica: None,
        on_inherit: Callable[[int], None] = lambda replica: None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """See EngineClient.start; all are told the number of the replica."""
        for replica, client in enumerate(self._clients):
            client.on_gone = partial(self._note_gone, replica)
            client.heir = partial(self._take_over, replica)
            client.start(
                partial(_call, on_stats, replica), partial(on_restart, replica), partial(on_inherit, replica), together
            )

    @property
    def readies(self) -> list[Ready]:
        """Of each replica."""
        return [client.ready for client in self._clients]

    @property
    def ready(self) -> Ready:
        """Of the one with the smallest pool: what it takes, all take."""
        return min(self.readies, key=lambda ready: (ready.max_model_len, ready.max_pool_tokens))

    @property
    def alive(self) -> bool:
        """False when no replica has an engine, and none will have one."""
        return any(client.alive for client in self._clients)

    @property
    def num_waiting(self) -> int:
        """Where the fewest wait; a replica that is being restarted counts only if all are."""
        clients = [client for client in self._clients if client.connected] or self._clients
        return min(client.num_waiting for client in clients)

    @property
    def front_end(self) -> int:
        return self._clients[0].front_end

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
        """See EngineClient.submit."""
        while True:
            client = self._clients[self._choose(prompt, cache_salt, family)]
            try:
                return client.submit(prompt, cache_salt, arrival, receive, family, traced=traced)
            except RequestError:
                if client.alive:
                    raise  # else it was lost just now, and another is asked

    def abort(self, request_id: int) -> None:
        """See EngineClient.abort. Of a replica that is lost the request is in another, or on its way there."""
        while True:
            replica = number_of(request_id) % len(self._clients)
            client = self._clients[replica]
            client.abort(request_id)
            if client.alive:
                return
            with self._lock:
                moved = self._moved.pop(request_id, None)
                if moved is None:
                    if replica not in self._settled:
                        self._aborted.add(request_id)
                    return
            request_id = moved

    def close(self) -> None:
        """See EngineClient.close. Engines end beside each other."""
        closers = [threading.Thread(target=client.close, name="close") for client in self._clients]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        if self._prefixes is not None:
            self._prefixes.close()
            self._prefixes = None

    # ---- which one

    def _choose(self, prompt: Prompt, cache_salt: str, family: int | None) -> int:
        """
        Raises:
            RequestError: there is no engine any more.
        """
        candidates = [number for number, client in enumerate(self._clients) if client.alive and client.connected]
        candidates = candidates or [number for number, client in enumerate(self._clients) if client.alive]
        if not candidates:
            raise RequestError("the engine is gone", ErrorKind.OVERLOADED)
        with self._lock:
            before = None if family is None else self._families.get(family)
        if before in candidates:
            return before
        first = next(self._num_asked) % len(candidates)  # of equals each in turn: their caches fill alike
        candidates = candidates[first:] + candidates[:first]
        chosen = best_of(candidates, self._num_known(prompt, cache_salt), [c.num_under_way for c in self._clients])
        if family is not None:
            with self._lock:
                self._families[family] = chosen
                if len(self._families) > _MAX_FAMILIES:
                    self._families.popitem(last=False)
        return chosen

    def _num_known(self, prompt: Prompt, cache_salt: str) -> list[int]:
        """Pages of the prompt that each replica has cached."""
        if self._prefixes is None:
            return [0] * len(self._clients)
        page_size, name = self._clients[0].ready.page_size, prompt.sampling.lora_name
        return self._prefixes.num_known(block_hashes_of(prompt.token_ids, page_size, name, cache_salt))

    # ---- when there is none any more

    def _take_over(self, replica: int, requests: list[LiveRequest]) -> list[LiveRequest]:
        """Of a replica that will have no engine. Returns those that no other can have."""
        left = [live for live in requests if not self._move(live)]
        with self._lock:
            self._settled.add(replica)
            left = [live for live in left if live.submit.request_id not in self._aborted]
            self._aborted = {one for one in self._aborted if number_of(one) % len(self._clients) != replica}
        return left

    def _move(self, live: LiveRequest) -> bool:
        """To a replica that takes it; False: there is none."""
        before, over = live.submit.request_id, threading.Event()
        receive = self._forgetting(live.receive, before, over)
        for client in sorted((client for client in self._clients if client.alive), key=lambda one: one.num_under_way):
            try:
                now = client.adopt(replace(live, receive=receive))
            except RequestError:
                continue
            with self._lock:
                if not over.is_set():
                    self._moved[before] = now
                aborted = before in self._aborted
            if aborted:
                self.abort(before)
            return True
        return False

    def _forgetting(self, receive: Receiver, before: int, over: threading.Event) -> Receiver:
        """At its end a request takes along what is known of its move."""

        def heard(piece: Piece) -> None:
            if piece.finish is not None:
                with self._lock:
                    over.set()
                    self._moved.pop(before, None)
            receive(piece)

        return heard

    def _note_gone(self, replica: int) -> None:
        self.on_replica_gone(replica)
        with self._lock:
            self._num_gone += 1
            all_gone = self._num_gone == len(self._clients)
        if all_gone and self._clients[0].tells_loss():  # front ends ask at the same replica's seat, whichever went last
            self.on_loss()


def _call(on_stats: Callable[[Stats, int], None], replica: int, stats: Stats) -> None:
    on_stats(stats, replica)


def best_of(candidates: Sequence[int], num_known: Sequence[int], num_under_way: Sequence[int]) -> int:
    """The replica that gets a request, of equals the first candidate.

    num_known: pages of its prompt that each has; num_under_way: requests.
    """
    best = min(candidates, key=lambda number: (-num_known[number], num_under_way[number]))
    least = min(candidates, key=lambda number: (num_under_way[number], -num_known[number]))
    allowed = num_under_way[least] + max(_SLACK_REQUESTS, _SLACK_SHARE * num_under_way[least])
    return best if num_under_way[best] <= allowed else least
