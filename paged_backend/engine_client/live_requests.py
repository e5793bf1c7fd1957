"""A front end's requests until their finish, with all that another engine must know to go on with them.

A live request is kept here with the tokens it got, and tokens follow from a request and its seed alone. So whoever
survives the engine can ask the next one to go on where the last one stopped, and the caller sees a pause.

A request that runs in death after death may be their cause. It is submitted as a suspect, which the engine runs beside
no other suspect (scheduler/quarantine); if engines die of it even so, it ends with an error and nobody else does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from paged_backend.engine_client.link import EngineLink
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.messages import CLEARED_AFTER_TOKENS, Abort, Finish, Found, PromptReport, Submit, Tokens, TokenScores

_SUSPECT_AFTER = 2  # deaths in a row while a request ran
# deaths in a row while it ran as the only suspect: engines die of something else, too, and long prompts need a while to
# be cleared
_GUILTY_AFTER = 4
_ENGINE_GONE = "the engine stopped; try again later"

log = logging.getLogger("paged")


class Piece(msgspec.Struct):
    """What one message brought for one request: tokens, and at its end a `Finish`.

    The Finish of a request comes in the message of its last token. A struct of msgspec's without lists of its own:
    there is one for each token of each stream, and they are made five times as fast as a dataclass with lists.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScores, ...] = ()  # per token, the chosen one first; empty if not asked for
    num_cached_tokens: int | None = None  # with the first token
    admitted: float | None = None  # seconds, CLOCK_MONOTONIC: with the first token of a traced request
    prompts: tuple[PromptReport, ...] = ()
    found: Found | None = None  # a beam search's whole answer, with the finish
    finish: Finish | None = None


Receiver = Callable[[Piece], None]


@dataclass
class LiveRequest:
    """One of them."""

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
        num_answered = self.submit.num_answered + len(self.token_ids)
        return msgspec.structs.replace(
            self.submit, prompt_ids=prompt_ids, num_answered=num_answered, resumed=resumed, suspect=suspect
        )


class LiveRequests:
    """Owns the requests and the link to the engine that has them. `submit` and `abort` may be called on any thread.

    Invariant: while there is a link, its engine was asked for every live request.
    """

    def __init__(self, max_queue_size: int) -> None:
        """max_queue_size: how many may wait while there is no engine."""
        self._max_queue_size = max_queue_size
        self._requests: dict[int, LiveRequest] = {}
        self._link: EngineLink | None = None  # None: there is no engine at the moment
        self._open = True
        self._lock = threading.Lock()  # of all three

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def link(self) -> EngineLink | None:
        return self._link

    @property
    def open(self) -> bool:
        """New requests are taken."""
        return self._open

    # ---- callers

    def submit(self, submit: Submit, receive: Receiver) -> None:
        """Every piece of its answer goes to `receive`, the last one with a `finish`.

        Raises:
            RequestError: there will be no engine any more; or there is none at the moment, and as many requests wait
                for it as the queue holds.
        """
        with self._lock:
            if not self._open:
                raise RequestError(_ENGINE_GONE, ErrorKind.OVERLOADED)
            if self._link is None and len(self._requests) >= self._max_queue_size:
                waiting = f"{len(self._requests)} requests wait for the engine, which is being restarted"
                raise RequestError(
                    f"{waiting}; the limit is {self._max_queue_size} (max_queue_size)", ErrorKind.OVERLOADED
                )
            self._requests[submit.request_id] = LiveRequest(submit, receive, sent=self._link is not None)
            if self._link is not None:
                self._link.send(submit)

    def abort(self, request_id: int) -> None:
        """Nothing more is heard of it. No effect if it is over already."""
        with self._lock:
            if self._requests.pop(request_id, None) is not None and self._link is not None:
                self._link.send(Abort(request_id))

    # ---- engines come and go

    def connect(self, link: EngineLink) -> None:
        """An engine is ready: every live request goes on in it."""
        with self._lock:
            for live in self._requests.values():
                link.send(live.resumed())
            self._link = link

    def disconnect(self) -> EngineLink | None:
        """The engine is gone: requests wait. Returns the link that led to it, to be closed."""
        with self._lock:
            link, self._link = self._link, None
        return link

    def note_death(self, running_ids: Collection[int], suspect_id: int | None) -> None:
        """An engine died while it ran these requests, one of them as the only suspect."""
        guilty = []
        with self._lock:
            for request_id, live in self._requests.items():
                if request_id not in running_ids:
                    continue
                live.deaths += 1
                live.strikes += request_id == suspect_id
                if live.strikes >= _GUILTY_AFTER:
                    guilty.append(request_id)
        for request_id in guilty:
            message = (
                f"the engine died {_GUILTY_AFTER} times while it ran this request alone among those that were "
                "running when it died before"
            )
            self.hand_out({request_id: Piece(finish=Finish(request_id, "", ErrorKind.INTERNAL, message))})

    def shut(self) -> None:
        """No request is taken any more."""
        with self._lock:
            self._open = False

    def take_all(self) -> list[LiveRequest]:
        """They are not live here any more: another engine is to have them."""
        with self._lock:
            taken, self._requests = list(self._requests.values()), {}
        return taken

    def adopt(self, live: LiveRequest) -> None:
        """Goes on with a request that another engine had.

        Raises:
            RequestError: no request is taken any more.
        """
        with self._lock:
            if not self._open:
                raise RequestError(_ENGINE_GONE, ErrorKind.OVERLOADED)
            self._requests[live.submit.request_id] = live
            if self._link is not None:
                self._link.send(live.resumed())

    # ---- answers

    def hand_out(self, pieces: Mapping[int, Piece]) -> None:
        """Gives every request its piece of a message."""
        with self._lock:
            get, take = self._requests.get, self._requests.pop
            asked = [
                (get(request_id) if piece.finish is None else take(request_id, None), piece)
                for request_id, piece in pieces.items()
            ]
        for live, piece in asked:
            if live is None:  # it was aborted, and the engine had not heard of it yet
                continue
            live.token_ids += piece.token_ids
            if live.deaths and len(live.token_ids) >= live.num_resumed + CLEARED_AFTER_TOKENS:
                live.deaths = live.strikes = 0
            try:
                live.receive(piece)
            except Exception:  # one request's trouble must not silence the others
                log.exception("a request's receiver failed")
                self.abort(live.submit.request_id)


def lose(requests: Iterable[LiveRequest]) -> None:
    """They end with one clear error: no engine will have them any more."""
    for live in requests:
        try:
            live.receive(Piece(finish=Finish(live.submit.request_id, "", ErrorKind.OVERLOADED, _ENGINE_GONE)))
        except Exception:  # one request's trouble must not silence the others
            log.exception("a request's receiver failed")


def pieces_of(tokens: Tokens) -> dict[int, Piece]:
    """A message by requests.

    Raises:
        ValueError, IndexError: its parts do not fit together.
    """
    request_ids: list[int] = np.frombuffer(tokens.request_ids, np.int64).tolist()
    token_ids: list[int] = np.frombuffer(tokens.token_ids, np.int32).tolist()
    pieces: dict[int, Piece] = {}
    if not tokens.logprobs and len(request_ids) == len(set(request_ids)):  # most messages by far
        pieces = {request_id: Piece((token_id,)) for request_id, token_id in zip(request_ids, token_ids, strict=True)}
        request_ids, token_ids = [], []
    logprobs: list[float] = np.frombuffer(tokens.logprobs, np.float32).tolist()
    ranks: list[int] = np.frombuffer(tokens.ranks, np.int32).tolist()
    for entry, (request_id, token_id) in enumerate(zip(request_ids, token_ids, strict=True)):
        piece = pieces.setdefault(request_id, Piece())
        piece.token_ids += (token_id,)
        if logprobs:
            top = {
                other: (logprob, place)
                for place, (other, logprob) in enumerate(tokens.top_logprobs.get(entry, {}).items(), 1)
            }
            piece.logprobs += (
                {token_id: (logprobs[entry], ranks[entry])}
                | {other: reported for other, reported in top.items() if other != token_id},
            )
    for request_id, num_cached_tokens in tokens.started.items():
        pieces.setdefault(request_id, Piece()).num_cached_tokens = num_cached_tokens
    for request_id, admitted in tokens.admitted.items():
        pieces.setdefault(request_id, Piece()).admitted = admitted
    for output in tokens.feature_outputs:
        piece = pieces.setdefault(output.request_id, Piece())
        if isinstance(output, Found):
            piece.found = output
        else:
            piece.prompts += (output,)
    for finish in tokens.finishes:
        pieces.setdefault(finish.request_id, Piece()).finish = finish
    return pieces
