"""What the engine tells those who watch it (`paged top`): numbers, and a map of the pool. No prompt, no answer, no
token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

WATCH_SOCKET = "watch.sock"  # in the engine's run folder, which is private to its user
MAX_CELLS = 32_768

# What a cell of the map says; numbers from FIRST_REQUEST on are requests (LiveRequest.number).
FREE, CACHED, SHARED, FIRST_REQUEST = 0, 1, 2, 3
_LAST_REQUEST = 65_535

Cells = NDArray[np.uint16]


class LiveRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request in the engine."""

    arrival_index: int  # order of arrival
    number: int  # what its pages are marked with in the map; 0 while it waits
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, from the prefix cache
    num_tokens: int  # prompt and answer
    num_pages: int
    age_seconds: float


class Snapshot(msgspec.Struct, frozen=True):
    """The engine at one moment. Counters count from the engine's start, `num_tokens` from the watching's."""

    model: str
    time: float  # seconds, CLOCK_MONOTONIC
    page_size: int
    num_pages: int
    pages_per_cell: int
    # uint16, little endian: one per `pages_per_cell` pages, in the order of their ids; of several the highest
    cells: bytes
    pages_free: int
    pages_held: int
    pages_shared: int  # of the held ones, by more than one request
    pages_cached: int
    live_tokens: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    num_tokens: int
    requests: tuple[LiveRequest, ...]  # oldest first; not all of them if there are many
    # from arrival to first token, of the requests that got theirs since the last snapshot
    first_token_seconds: tuple[float, ...]
    # between steps that brought tokens, since the last snapshot: what a streaming caller waits for his next token
    step_seconds: tuple[float, ...]
    drafts_proposed: int = 0
    drafts_accepted: int = 0  # of which were right
    drafts_checked: int = 0  # times that a sequence had any in a step


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Snapshot).decode


def page_cells(
    num_pages: int, cached: Collection[int], held: Sequence[tuple[int, list[int]]]
) -> tuple[Cells, int, int]:
    """(cells, pages per cell, number of shared pages). cached: page ids; held: (request number, its page ids)."""
    cells = np.zeros(num_pages, np.uint16)
    cells[np.fromiter(cached, np.intp, len(cached))] = CACHED
    num_shared = 0
    if held:
        pages = np.concatenate([np.array(pages, np.intp) for _, pages in held])
        cells[pages] = np.repeat(np.array([number for number, _ in held], np.uint16), [len(pages) for _, pages in held])
        shared = np.bincount(pages, minlength=num_pages) > 1
        cells[shared] = SHARED
        num_shared = int(shared.sum())
    per_cell = -(-num_pages // MAX_CELLS)
    if per_cell > 1:
        cells = np.pad(cells, (0, -num_pages % per_cell)).reshape(-1, per_cell).max(axis=1)
    return cells, per_cell, num_shared


class Numbers:
    """Gives each request a number for the map and keeps it as long as the request lives; the smallest free one, so that
    colours are few.
    """

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def renew(self, request_ids: Sequence[int]) -> dict[int, int]:
        """Request id → number, for these requests; the others' become free."""
        kept = {request_id: self._of[request_id] for request_id in request_ids if request_id in self._of}
        taken = set(kept.values())
        free = (number for number in range(FIRST_REQUEST, _LAST_REQUEST + 1) if number not in taken)
        self._of = kept | {request_id: next(free) for request_id in request_ids if request_id not in kept}
        return self._of
