"""A request as spans for an OpenTelemetry collector, by the names of the GenAI semantic conventions. No span holds a
prompt, an answer or a stop string.

chat paged_llm            the request, a child of the caller's span
  tokenize                from its arrival until the engine was asked
  queue                   … until the scheduler let it in
  prefill                 … until its first token was here
  decode                  … until its last token was here
  send                    … until the server had taken the final response
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paged_backend.errors import ErrorKind
from paged_backend.frontend.metrics import reason_of
from paged_backend.request import Request
from paged_backend.tracing import EpochClock, Tracing

PHASES = ("tokenize", "queue", "prefill", "decode", "send")
ASKED = {  # sampling key -> attribute; https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "n": "gen_ai.request.choice.count",
}
_LONGEST_NAME = 64  # characters
_ERRORS = frozenset(map(reason_of, ErrorKind))


@dataclass(frozen=True)
class Times:
    """When a request came to which point: seconds, time.monotonic(); None: not known, or it never came so far."""

    arrival: float
    submitted: float | None
    admitted: float | None
    first_token: float | None
    last_token: float | None
    sent: float

    def phases(self) -> Iterator[tuple[str, float, float]]:
        """(name, beginning, end) of those whose beginning is known; one that never ended lasts until the request was
        over. If nobody knows when the request was let in (another engine has answered the beginning), it has neither
        queue nor prefill.
        """
        points = [self.arrival, self.submitted, self.admitted, self.first_token, self.last_token, self.sent]
        reached = max(index for index, point in enumerate(points[:-1]) if point is not None)
        for index, (name, (start, end)) in enumerate(zip(PHASES, pairwise(points), strict=True)):
            if index == reached:
                end = self.sent
            if index <= reached and start is not None and end is not None:
                yield name, start, max(start, end)


@dataclass(frozen=True)
class Outcome:
    """What came of a request."""

    reason: str  # as paged_requests_finished_total has it: the last finish reason, or an error's
    finish_reasons: Sequence[str]  # of its sequences
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class RequestSpans:
    """Tells a collector of the requests of one model. Thread-safe."""

    def __init__(self, tracing: Tracing, model_name: str) -> None:
        """model_name: as clients call it."""
        self._tracing = tracing
        self._model_name = model_name

    def record(self, request: Request, times: Times, outcome: Outcome) -> None:
        """A request that is over. Takes a tenth of a millisecond; the SDK's thread does the sending."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        tracing, clock = self._tracing, EpochClock()
        attributes = self._attributes(request, times, outcome)
        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        whole = tracing.start(name, SpanKind.SERVER, tracing.caller(request.trace), clock.ns(times.arrival), attributes)
        if whole.is_recording():
            if outcome.reason in _ERRORS:
                whole.set_attribute("error.type", outcome.reason)
                whole.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(whole)
            for phase, start, end in times.phases():
                tracing.start(phase, SpanKind.INTERNAL, inside, clock.ns(start)).end(clock.ns(end))
        whole.end(clock.ns(times.sent))

    def close(self) -> None:
        self._tracing.close()

    def _attributes(self, request: Request, times: Times, outcome: Outcome) -> dict[str, Any]:
        sampling = request.sampling
        asked = {name: getattr(sampling, key) for key, name in ASKED.items() if getattr(sampling, key) is not None}
        if sampling.seed is not None:
            asked[ASKED["seed"]] = (sampling.seed + 2**63) % 2**64 - 2**63  # an attribute has 63 bits and a sign
        adapter = f":{_sendable(sampling.lora_name)}" if sampling.lora_name else ""
        known: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion" if request.chat is None else "chat",
            "gen_ai.provider.name": "paged",
            "gen_ai.request.model": f"{self._model_name}{adapter}",
            "gen_ai.request.stream": request.stream,
            "gen_ai.response.finish_reasons": list(outcome.finish_reasons),
            "gen_ai.usage.input_tokens": outcome.num_input_tokens,
            "gen_ai.usage.cache_read.input_tokens": outcome.num_cached_tokens,
            "gen_ai.usage.output_tokens": outcome.num_output_tokens,
        }
        if request.caller_id:
            known["gen_ai.response.id"] = _sendable(request.caller_id)
        if times.first_token is not None:
            known["gen_ai.response.time_to_first_chunk"] = times.first_token - times.arrival
        return asked | known


def _sendable(name: str) -> str:
    """What a caller calls something, short, and in UTF-8 whatever it was: one attribute that cannot be encoded costs
    its whole batch.
    """
    return name[:_LONGEST_NAME].encode(errors="replace").decode()
