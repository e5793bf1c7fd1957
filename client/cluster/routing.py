"""Which server gets a request: the one with most of the prompt in its prefix cache and least to do, as NVIDIA Dynamo's
selection sees it; or simply the one with the fewest outstanding requests; or, to compare with, each in turn.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paged_client.cluster.servers import Server, Servers

_SESSION_SECONDS = 3600.0  # for which a session that says nothing is remembered
_MAX_SESSIONS = 100_000
_MODEL = "paged"  # the selection's name for the only model behind a gateway

log = logging.getLogger("paged.cluster")


@dataclass(frozen=True)
class Inquiry:
    """What a router may know of a request."""

    token_ids: Sequence[int] | None  # of the prompt, and of the answer so far; None: not known here
    session: str = ""  # requests of one session go to one server while it is there
    cache_salt: str = ""
    lora_name: str | None = None
    max_tokens: int | None = None


class Ticket(Protocol):
    """A place that a request has on a server, until it is given back."""

    server: Server

    async def begun(self) -> None:
        """Its first token has come."""

    async def over(self) -> None: ...


class Router(Protocol):
    async def choose(self, inquiry: Inquiry, candidates: Sequence[Server]) -> Ticket:
        """candidates: servers that are ready, at least one."""


class _Counted:
    """Counts a server's outstanding requests."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.num_outstanding += 1
        server.num_asked += 1

    async def begun(self) -> None:
        pass

    async def over(self) -> None:
        self.server.num_outstanding -= 1


class Sessions:
    """Which server a session's last request went to."""

    def __init__(self) -> None:
        self._server_of: OrderedDict[str, tuple[Server, float]] = OrderedDict()

    def find(self, session: str, candidates: Sequence[Server]) -> Server | None:
        server, until = self._server_of.get(session, (None, 0.0))
        return server if server is not None and server in candidates and time.monotonic() < until else None

    def note(self, session: str, server: Server) -> None:
        if session:
            self._server_of[session] = (server, time.monotonic() + _SESSION_SECONDS)
            self._server_of.move_to_end(session)
            if len(self._server_of) > _MAX_SESSIONS:
                self._server_of.popitem(last=False)


class LeastOutstanding:
    """The server with the fewest outstanding requests of this gateway; among equals each in turn."""

    def __init__(self) -> None:
        self._sessions = Sessions()
        self._next_choice = 0

    async def choose(self, inquiry: Inquiry, candidates: Sequence[Server]) -> Ticket:
        server = self._sessions.find(inquiry.session, candidates)
        if server is None:
            self._next_choice += 1
            ordered = [candidates[(self._next_choice + index) % len(candidates)] for index in range(len(candidates))]
            server = min(ordered, key=lambda one: one.num_outstanding)
        self._sessions.note(inquiry.session, server)
        return _Counted(server)


class RoundRobin:
    """Each server in turn, whatever it has to do."""

    def __init__(self) -> None:
        self._next_choice = itertools.count()

    async def choose(self, inquiry: Inquiry, candidates: Sequence[Server]) -> Ticket:
        return _Counted(candidates[next(self._next_choice) % len(candidates)])


class _Reserved(_Counted):
    """A reservation in Dynamo's books."""

    def __init__(self, server: Server, selection: Any, selection_id: str) -> None:
        super().__init__(server)
        self._selection = selection
        self._selection_id = selection_id

    async def begun(self) -> None:
        await _quietly(self._selection.prefill_complete(self._selection_id))

    async def over(self) -> None:
        await super().over()
        await _quietly(self._selection.free_reservation(self._selection_id))


def load_selection() -> Any:
    """The class SelectionService.

    Raises:
        ImportError: the package is not installed.
    """
    os.environ.setdefault("DYN_LOG", "error")  # else a line for every request
    from dynamo.llm import SelectionService

    return SelectionService


class KvAware:
    """NVIDIA Dynamo's selection (`dynamo.llm.SelectionService`), in this process: it listens to every server's KV
    events and books the load of every request. A request whose tokens are not known here, and every request while a
    server tells nothing, goes to the server with the least to do.
    """

    def __init__(self, servers: Servers) -> None:
        """
        Raises:
            ImportError: the package is not installed.
        """
        self._selection = load_selection()(indexer_threads=2, session_affinity_ttl_secs=_SESSION_SECONDS)
        self._servers = servers
        self._known: set[int] = set()
        self._silent: set[str] = set()  # servers of which it was said that they tell nothing
        self._numbers = itertools.count()
        self._otherwise = LeastOutstanding()
        servers.on_change(self.update)

    async def update(self) -> None:
        """Tells Dynamo who is there."""
        ready = {server.number: server for server in self._servers.ready()}
        for number in self._known - ready.keys():
            await _quietly(self._selection.delete_worker(number))
        for number in ready.keys() - self._known:
            await self._register(ready[number])
        self._known &= ready.keys()

    async def _register(self, server: Server) -> None:
        addresses, facts = server.kv_addresses, server.facts
        if addresses is None or facts is None:
            if server.url not in self._silent:
                log.warning(
                    "%s tells nobody what it has cached (kv_events): requests go where the fewest are", server.url
                )
                self._silent.add(server.url)
            return
        worker = {
            "worker_id": server.number,
            "model_name": _MODEL,
            "endpoint": server.url,
            "block_size": facts.page_size,
            "kv_events_endpoint": addresses[0],
            "replay_endpoint": addresses[1],
            "max_num_batched_tokens": facts.max_batched_tokens,
            "total_kv_blocks": facts.num_pages,
        }
        await self._selection.upsert_worker(worker)
        self._known.add(server.number)

    async def choose(self, inquiry: Inquiry, candidates: Sequence[Server]) -> Ticket:
        if inquiry.token_ids is None or not all(server.number in self._known for server in candidates):
            return await self._otherwise.choose(inquiry, candidates)
        selection_id = f"{next(self._numbers)}"
        asked = {
            "model_name": _MODEL,
            "selection_id": selection_id,
            "token_ids": list(inquiry.token_ids),
            "allowed_worker_ids": [server.number for server in candidates],
            **({"session_id": inquiry.session} if inquiry.session else {}),
            **({"cache_salt": inquiry.cache_salt} if inquiry.cache_salt else {}),
            **({"lora_name": inquiry.lora_name} if inquiry.lora_name else {}),
            **({"expected_output_tokens": inquiry.max_tokens} if inquiry.max_tokens else {}),
        }
        try:
            chosen = await self._selection.select_and_reserve(asked)
        except Exception as error:  # whatever it raises, the request can be answered all the same
            log.warning("the selection failed, the server with the fewest requests is taken: %s", error)
            return await self._otherwise.choose(inquiry, candidates)
        server = next(server for server in candidates if server.number == chosen["worker_id"])
        return _Reserved(server, self._selection, selection_id)

    async def known_tokens(self, inquiry: Inquiry) -> dict[int, int]:
        """Server's number → tokens of the prompt that Dynamo believes to be there."""
        answer = await self._selection.overlap_scores(
            {"model_name": _MODEL, "token_ids": list(inquiry.token_ids or ())}
        )
        return {one["worker_id"]: one["device_blocks"] * answer["block_size"] for one in answer["workers"]}

    def close(self) -> None:
        self._selection.shutdown()


async def _quietly(awaited: Any) -> None:
    """Bookkeeping of what may be gone already: a worker that was deleted takes its reservations along."""
    try:
        await awaited
    except Exception as error:
        log.debug("the selection's books: %s", error)
