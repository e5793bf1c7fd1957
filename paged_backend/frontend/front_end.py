"""A front end: takes requests, gives each an `Answer` that joins prompt, engine, detokenizer and streamer, and watches
over them. Knows no server.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.replicas import Replicas
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.answer import Answer, Services
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.generation_defaults import GenerationDefaults
from paged_backend.frontend.metrics import Tally, reason_of
from paged_backend.frontend.prompt import PromptReader
from paged_backend.frontend.spans import RequestSpans
from paged_backend.frontend.streamer import Send, Streamer
from paged_backend.request import Request
from paged_backend.tracing import open_tracing

_CANCEL_POLL_SECONDS = 0.025
# for each live request: asking is a round trip that costs a front end 34 us of CPU and the server as much, a third of
# a response, so asking 64 callers every 25 ms took a quarter of what a front end spent
_SECONDS_A_QUESTION = 0.001
_DRAIN_SECONDS = 20.0  # the server gives all instances together 30 s to stop

log = logging.getLogger("paged")


class FrontEnd:
    """Thread-safe. `ask` returns at once; the answer goes out on the streamer's threads."""

    def __init__(
        self,
        config: EngineConfig,
        key: str,
        num_front_ends: int,
        command: Sequence[str] | None = None,
        on_loss: Callable[[], None] = lambda: None,
        model_name: str = "",
    ) -> None:
        """Returns when the engine is ready. See EngineClient.connect. model_name: as clients call it.

        on_loss: called in one front end of all, on the thread that hears the engine, when there will be no engine any
            more; must return at once.

        Raises:
            EngineError: the engine cannot start.
        """
        self.config = config
        tracing = open_tracing(config.otlp_traces_endpoint, "paged", {"gen_ai.request.model": model_name})
        self._spans = None if tracing is None else RequestSpans(tracing, model_name)
        kind = EngineClient if config.replicas == 1 else Replicas
        self.client: EngineClient | Replicas = kind.connect(config, key, num_front_ends, command)
        self.client.on_loss = on_loss
        try:
            self.prompts = PromptReader(config, self.client.ready)
        except BaseException:
            self.client.close()
            raise
        if self.client.front_end == 0:
            _warn_of_unknown_tokens(self.prompts.unknown_tokens())
        self.generation_defaults = GenerationDefaults(self.client.ready.sampling, config.generation_defaults)
        self.tally = Tally(config, self.client.readies)
        self.streamer = Streamer(config.stream_max_delay_ms / 1000)
        self._answers: dict[int, Answer] = {}  # by id(answer); from arrival to final response
        self._open = True
        self._drain_by = math.inf  # seconds, time.monotonic(): live requests end then
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cancel", daemon=True)
        if isinstance(self.client, Replicas):
            self.client.on_replica_gone = self.tally.note_gone
        self.client.start(self.tally.take_stats, self.tally.note_restart, self.tally.inherit, self.streamer.together)
        self._watcher.start()

    @property
    def alive(self) -> bool:
        return self._open and self.client.alive

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells, special ones too; nothing without a tokenizer."""
        return b"" if self.prompts.token_bytes is None else self.prompts.token_bytes.of(token_id)

    def ask(self, request: Request, send: Send, is_cancelled: Callable[[], bool]) -> None:
        """Answers `request` by calls of `send` from other threads: deltas, the last ones final, whatever happens.

        is_cancelled: asked every 25 ms, or of n live requests every n ms if that is longer; never during or after the
            final call of `send`. True ends the request.
        """
        services = Services(self.config, self.client, self.prompts, self.tally, self.streamer, self._spans)
        answer = Answer(services, request, send, is_cancelled, self.forget)
        self._answers[id(answer)] = answer
        refusal = self._refusal()
        if refusal is None:
            self.prompts.soon(answer.begin, request)
        else:
            answer.fail(refusal)

    def _refusal(self) -> RequestError | None:
        """Before any work is done: the engine, which refuses for certain, hears of a request only after its prompt was
        read, and between two steps. Those whose prompts are to be read wait, too.
        """
        if not self._open:
            return RequestError("the model is being unloaded", ErrorKind.OVERLOADED)
        waiting, limit = self.client.num_waiting + self.prompts.num_waiting, self.config.max_queue_size
        if waiting >= limit:
            return RequestError(
                f"{waiting} requests are waiting, the limit is {limit} (max_queue_size)", ErrorKind.OVERLOADED
            )
        return None

    def refuse(self, error: RequestError, send: Send) -> None:
        """Answers a request that could not even be read."""
        reason = reason_of(error.kind)
        channel = self.streamer.open(
            send, lambda _: self.tally.add("paged_requests_finished_total", label=reason), stream=False
        )
        self.streamer.put(channel, Delta(error=error, last=True))

    def tell_health(self, send: Send) -> None:
        """Answers at once: with an empty text if requests are taken, with an error if the model has no engine and will
        have none, or is being unloaded.
        """
        channel = self.streamer.open(send, lambda _: None, stream=False)
        if self.alive:
            self.streamer.put(channel, Delta(finish_reason="stop", last=True))
        else:
            reason = "the model has no engine any more" if self._open else "the model is being unloaded"
            self.streamer.put(channel, Delta(error=RequestError(reason, ErrorKind.OVERLOADED), last=True))

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and gives the live ones so long; returns at once. No effect the second time."""
        if self._open:
            self._drain_by = time.monotonic() + seconds
            self._open = False

    def _end_all(self) -> None:
        for answer in list(self._answers.values()):
            answer.fail(RequestError("the model is being unloaded", ErrorKind.OVERLOADED))

    def close(self, drain_seconds: float = _DRAIN_SECONDS) -> None:
        """Takes no more requests, waits for the live ones, ends those that are left, and leaves the engine."""
        self.drain(drain_seconds)
        if not self.streamer.wait_until_all_ended(max(0.0, self._drain_by - time.monotonic())):
            self._end_all()
            self.streamer.wait_until_all_ended(1.0)
        self._stopping.set()
        self._watcher.join()
        self.prompts.close()
        self.streamer.close()
        self.client.close()
        if self._spans is not None:
            self._spans.close()

    def forget(self, answer: Answer) -> None:
        self._answers.pop(id(answer), None)

    def _watch(self) -> None:
        """The side thread: asks the server who has left, and looks whose time is up: its own, or everybody's."""
        while not self._stopping.wait(max(_CANCEL_POLL_SECONDS, _SECONDS_A_QUESTION * len(self._answers))):
            for answer in list(self._answers.values()):
                answer.poll_cancellation()
                answer.poll_deadline(time.monotonic())
            if time.monotonic() > self._drain_by:
                self._end_all()


def _warn_of_unknown_tokens(unknown: Mapping[str, int]) -> None:
    if unknown:
        token, token_id = next(iter(unknown.items()))
        log.warning(
            "warning: the tokenizer knows %d tokens that the model has no embedding of, '%s' (id %d) first: "
            "prompts with one are refused",
            len(unknown), token, token_id,
        )  # fmt: skip
