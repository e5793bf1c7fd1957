"""Publishes snapshots of the engine while somebody watches (`paged top`), a few times a second and never for more than
2 % of the time.

Watchers subscribe at a socket in the engine's run folder, so only the engine's own user can. While nobody does, a turn
of the engine's loop pays for two comparisons, and four times a second for one look at the socket.
"""

from __future__ import annotations

import time
from pathlib import Path

import zmq

from paged_backend.batch import StepOutput
from paged_backend.engine.snapshot import WATCH_SOCKET, LiveRequest, Numbers, Snapshot, encode, page_cells
from paged_backend.messages import Submit
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.scheduler.sequence import Sequence, Status

_PERIOD_SECONDS = 0.25
_SHARE = 0.02  # of the loop's time
_MAX_RUNNING, _MAX_WAITING = 256, 64  # told one by one
_UNSENT = 2  # snapshots kept for a watcher that does not keep up


class Watch:
    """The engine's side. Lives on the engine's thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, model: str, scheduler: Scheduler, page_size: int
    ) -> None:
        """model: a name for people."""
        self._socket = context.socket(zmq.XPUB)
        self._socket.set_hwm(_UNSENT)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"ipc://{folder}/{WATCH_SOCKET}")
        self._model = model
        self._scheduler = scheduler
        self._page_size = page_size
        self._watched = False
        self._next = 0.0
        self._begin()

    def _begin(self) -> None:
        """What the last watcher has seen is forgotten."""
        self._numbers = Numbers()
        self._arrivals: dict[int, float] = {}  # of requests without a token yet
        self._num_tokens = 0
        self._last_tokens: float | None = None  # when a step last brought tokens, unless the engine was idle since
        self._first_token_seconds: list[float] = []
        self._step_seconds: list[float] = []

    def note_request(self, submit: Submit) -> None:
        if self._watched:
            self._arrivals[submit.request_id] = submit.arrival

    def note_step(self, output: StepOutput) -> None:
        if not self._watched:
            return
        now = time.monotonic()
        self._num_tokens += len(output.request_ids)
        for request_id in output.started:
            arrival = self._arrivals.pop(request_id, None)
            if arrival is not None:
                self._first_token_seconds.append(now - arrival)
        if len(output.request_ids):
            if self._last_tokens is not None:
                self._step_seconds.append(now - self._last_tokens)
            self._last_tokens = now if self._scheduler.has_work else None

    def publish(self) -> None:
        """Sends a snapshot if one is due and somebody watches."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PERIOD_SECONDS
        self._look_for_watchers()
        if self._watched:
            self._socket.send(encode(self._snapshot(now)))  # to a watcher that does not keep up: dropped
            self._next = now + max(_PERIOD_SECONDS, (time.monotonic() - now) / _SHARE)

    def _look_for_watchers(self) -> None:
        """The socket tells of the first subscription and of the end of the last."""
        while self._socket.poll(0):
            self._watched = self._socket.recv()[:1] == b"\x01"
            self._begin()

    def _snapshot(self, now: float) -> Snapshot:
        scheduler = self._scheduler
        sequences = scheduler.sequences
        running = [sequence for sequence in sequences if sequence.status is Status.RUNNING]
        waiting = [sequence for sequence in sequences if sequence.status is Status.WAITING]
        numbers = self._numbers.renew([sequence.request_id for sequence in running])
        self._arrivals = {sequence.request_id: sequence.spec.arrival for sequence in sequences if not sequence.answered}
        held = [(numbers[sequence.request_id], sequence.held_pages) for sequence in running]
        cells, pages_per_cell, num_shared = page_cells(scheduler.pool.num_pages, scheduler.pool.cached_pages, held)
        reported = running[:_MAX_RUNNING] + waiting[:_MAX_WAITING]
        snapshot = Snapshot(
            model=self._model,
            time=now,
            page_size=self._page_size,
            num_pages=scheduler.pool.num_pages,
            pages_per_cell=pages_per_cell,
            cells=cells.astype("<u2").tobytes(),
            pages_free=scheduler.pool.num_free,
            pages_held=scheduler.pool.num_held,
            pages_shared=num_shared,
            pages_cached=scheduler.pool.num_cached,
            live_tokens=scheduler.live_tokens(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_tokens=self._num_tokens,
            requests=tuple(
                [self._reported(sequence, numbers.get(sequence.request_id, 0), now) for sequence in reported]
            ),
            first_token_seconds=tuple(self._first_token_seconds),
            step_seconds=tuple(self._step_seconds),
            drafts_proposed=scheduler.speculation.num_proposed,
            drafts_accepted=scheduler.speculation.num_accepted,
            drafts_checked=scheduler.speculation.num_checked,
        )
        self._first_token_seconds.clear()
        self._step_seconds.clear()
        return snapshot

    def _reported(self, sequence: Sequence, number: int, now: float) -> LiveRequest:
        return LiveRequest(
            arrival_index=sequence.spec.arrival_index,
            number=number,
            num_prompt_tokens=sequence.spec.prompt_len,
            num_cached_tokens=sequence.num_cached_tokens,
            num_tokens=self._scheduler.num_tokens(sequence),
            num_pages=len(sequence.held_pages),
            age_seconds=now - sequence.spec.arrival,
        )
