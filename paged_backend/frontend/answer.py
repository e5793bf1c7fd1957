"""One request on its way: read → submitted → pieces → final response. A request of n answers is n sequences in the
engine, strands of one answer here.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from paged_backend.config import EngineConfig
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.live_requests import Piece
from paged_backend.engine_client.replicas import Replicas
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.detokenizer import AnswerText, stops_of
from paged_backend.frontend.embeddings import embedding_delta
from paged_backend.frontend.metrics import Tally, reason_of
from paged_backend.frontend.prompt import PromptReader
from paged_backend.frontend.prompt_logprobs import PromptTableParts
from paged_backend.frontend.spans import Outcome, RequestSpans, Times
from paged_backend.frontend.strand import Strand, beam_pieces, strand_sampling
from paged_backend.frontend.streamer import Channel, Send, Streamer, joined
from paged_backend.frontend.tasks import answer_task
from paged_backend.messages import (
    Prompt,
    PromptEmbedding,
    PromptLogprobs,
    front_end_of,
    number_of,
)
from paged_backend.request import Request

_CONTEXT_TOKENS = 256  # of the prompt, that the detokenizer may look at
_FAREWELL_SECONDS = 0.1  # after a cancellation
# the engine ends overdue requests; only what it does not know, or cannot hear, is ended here
_DEADLINE_GRACE_SECONDS = 0.5
_LONGEST_NAME = 64  # characters of a caller's id that are logged

log = logging.getLogger("paged")


@dataclass(frozen=True)
class Services:
    """What the answers of a front end share."""

    config: EngineConfig
    client: EngineClient | Replicas
    prompts: PromptReader
    tally: Tally
    streamer: Streamer
    spans: RequestSpans | None = None  # None: nobody collects them


class Answer:
    """Passes through several threads, which its lock orders. Open the channel, then `begin`; `send` and `ended` are the
    channel's.
    """

    def __init__(
        self,
        services: Services,
        request: Request,
        send: Send,
        is_cancelled: Callable[[], bool],
        forget: Callable[[Answer], None],
    ) -> None:
        """forget: called after the final response."""
        self._services = services
        self._request = request
        self._send: Send | None = send
        self._is_cancelled: Callable[[], bool] | None = is_cancelled
        self._forget = forget
        self._lock = threading.Lock()
        self._strands: list[Strand] = []
        # best_of: what each strand said, until it is known which ones are sent
        self._candidates: list[list[Delta]] | None = None
        self._over = False
        self._farewell_time: float | None = None  # when a caller who left gets the final response
        self._prompt_len = 0
        self._prompt_parts: PromptTableParts | None = None  # until the table is sent
        self._submitted_time: float | None = None
        self._admitted_time: float | None = None  # of the first strand, where spans are collected
        self._is_plain = False  # from now on tokens are passed on as they come: nothing goes with one, or waits for all
        self._first_token_time = 0.0
        self._last_token_time = 0.0
        self._outcome = reason_of(ErrorKind.INTERNAL)
        no_text = services.prompts.tokenizer is None or not request.sampling.detokenize
        tokens_matter = no_text or request.outputs.output_ids or request.outputs.logprobs
        self._channel: Channel = services.streamer.open(self.send, self.ended, request.stream, tokens_matter)

    # ---- its way in

    def begin(self) -> None:
        """On the thread that asked, or a prompt thread: tokenises and submits."""
        if self._over:
            return
        try:
            if self._request.task not in ("generate", "embed"):
                self._answer_task()
                return
            prompt = self._services.prompts.read(self._request)
            with self._lock:
                if not self._over:
                    self._submit(prompt)
        except RequestError as error:
            self.fail(error)
        except Exception:
            log.exception("a prompt could not be read")
            self.fail(RequestError("the prompt could not be read", ErrorKind.INTERNAL))

    def _answer_task(self) -> None:
        answer = answer_task(self._request, self._services.prompts, self._services.config)
        with self._lock:
            if not self._over:
                self._over = True
                self._outcome = "stop"
                self._services.streamer.put(self._channel, answer)

    def _submit(self, prompt: Prompt) -> None:
        request, services = self._request, self._services
        sampling = prompt.sampling
        self._prompt_len = len(prompt.token_ids)
        if sampling.prompt_logprobs is not None:
            self._prompt_parts = PromptTableParts(prompt.token_ids, sampling.prompt_logprobs)
        count = sampling.best_of or sampling.n
        if count > sampling.n:
            self._candidates = [[] for _ in range(count)]
        context = prompt.token_ids[-_CONTEXT_TOKENS:].tolist()
        wants_logprobs = sampling.logprobs is not None
        prompts, stops = services.prompts, stops_of(sampling)
        self._strands = [
            Strand(index, AnswerText(prompts.tokenizer, context, sampling, stops, prompts.token_texts), wants_logprobs)
            for index in range(count)
        ]
        if prompt.answer_ids is not None:
            self._strands[0].pass_over(prompt.answer_ids.tolist())
        if request.prepend_prompt and sampling.detokenize:
            text = services.prompts.text_of(request)
            for index in range(count):
                self._pass_on(Delta(index=index, text=text))
        family = secrets.randbits(62) if count > 1 else None
        submit = partial(services.client.submit, traced=services.spans is not None)
        self._submitted_time = time.monotonic()
        if sampling.use_beam_search:  # one search, of which all strands are
            strand = self._strands[0]
            strand.request_id = submit(prompt, request.cache_salt, request.arrival, partial(self._receive, strand))
            return
        for strand in self._strands:
            mine = replace(prompt, sampling=strand_sampling(sampling, strand.index))
            strand.request_id = submit(
                mine, request.cache_salt, request.arrival, partial(self._receive, strand), family
            )
        for strand in self._strands:
            strand.prepare()

    # ---- its way out

    def _receive(self, strand: Strand, piece: Piece) -> None:
        """On the engine client's thread."""
        try:
            if self._take_token(strand, piece):
                return
            with self._lock:
                if piece.found is None:
                    if not self._over and not strand.over:
                        self._take(strand, piece)
                    return
                for mine, part in zip(self._strands, beam_pieces(piece, piece.found), strict=True):
                    if not self._over and not mine.over:
                        self._take(mine, part)
        except Exception:
            log.exception("a piece of an answer could not be read")
            self.fail(RequestError("the answer could not be decoded", ErrorKind.INTERNAL))

    def _take_token(self, strand: Strand, piece: Piece) -> bool:
        """Most pieces by far are one more token of a stream, and take this short way. False: this one is not.

        Without the lock, which costs as much as all the rest: a strand's tokens come on one thread, and the channel
        takes nothing after an end that another thread has put there.
        """
        if not self._is_plain or self._over or strand.over:
            return False
        delta = strand.take_token(piece, self._prompt_len)
        if delta is None:
            return False
        self._last_token_time = time.monotonic()
        self._services.tally.add_token()
        self._services.streamer.put(self._channel, delta)
        return True

    def _take(self, strand: Strand, piece: Piece) -> None:
        if self._prompt_parts is not None:
            for part in (report for report in piece.prompts if isinstance(report, PromptLogprobs)):
                self._prompt_parts.add(part.start, part.logprobs, part.ranks, part.top_ids, part.top_logprobs)
        if piece.admitted is not None and self._admitted_time is None:
            self._admitted_time = piece.admitted
        if not piece.token_ids and piece.finish is None:
            return
        delta, must_stop = strand.take(piece, self._prompt_len)
        if must_stop and strand.request_id is not None:
            self._services.client.abort(strand.request_id)
        embedding = None
        if piece.prompts:
            embedding = next((report for report in piece.prompts if isinstance(report, PromptEmbedding)), None)
        if embedding is not None:
            delta, strand.num_tokens = embedding_delta(delta, embedding, self._request), 0
        if delta.token_ids or embedding is not None:
            self._count(len(delta.token_ids), embedding is not None)
        if not strand.over and self._candidates is None:
            self._pass_on(delta)
            self._is_plain = self._prompt_parts is None
            return
        if delta.error is not None:
            self._end_with(delta)
            self._abort()
            return
        last = strand.over and all(other.over for other in self._strands)
        if last and delta.finish_reason is not None:
            self._outcome = delta.finish_reason
        self._over = last
        if self._candidates is not None:
            self._candidates[strand.index].append(delta)
            if last:
                self._choose(self._candidates)
        else:
            self._pass_on(msgspec.structs.replace(delta, last=last) if last else delta)

    def _choose(self, candidates: list[list[Delta]]) -> None:
        """best_of: the n likeliest strands are the answer."""
        ranked = sorted(self._strands, key=lambda strand: -strand.cumulative_logprob)[: self._request.sampling.n]
        for index, strand in enumerate(ranked):
            whole = joined(candidates[strand.index])
            self._put(msgspec.structs.replace(whole, index=index, last=index == len(ranked) - 1))

    def _pass_on(self, delta: Delta) -> None:
        if self._candidates is not None and not delta.last:
            self._candidates[delta.index].append(delta)
        elif self._prompt_parts is None:
            self._services.streamer.put(self._channel, delta)
        else:
            self._put(delta)

    def _put(self, delta: Delta) -> None:
        """The prompt's log-probabilities go with the first delta after they are known."""
        if self._prompt_parts is not None:
            delta = msgspec.structs.replace(delta, prompt=self._prompt_parts.whole())
            if delta.prompt is not None:
                self._prompt_parts = None
        self._services.streamer.put(self._channel, delta)

    def _count(self, num_tokens: int, is_embedding: bool) -> None:
        tally = self._services.tally
        self._last_token_time = time.monotonic()
        if not self._first_token_time:
            self._first_token_time = self._last_token_time
            if not is_embedding:
                tally.observe("paged_time_to_first_token_seconds", self._first_token_time - self._request.arrival)
            tally.add("paged_prompt_tokens_total", self._prompt_len)
            tally.observe("paged_request_prompt_tokens", self._prompt_len)
        tally.add("paged_generation_tokens_total", num_tokens)

    # ---- its ends

    def poll_cancellation(self) -> None:
        """On the side thread, again and again (`FrontEnd.ask`). Pages are given back at once when the caller has left;
        the final response is sent later: Triton Server 2.51 aborts now and then when it comes while its gRPC thread is
        still at the cancellation (gRPC's "prior > 0" in sync.cc; once in 1,500 cancellations on two loaded cores, never
        in 30,000 with a tenth of a second between them).
        """
        with self._lock:
            if self._farewell_time is not None:
                if time.monotonic() >= self._farewell_time:
                    self._farewell_time = None
                    self._end_with(Delta(error=RequestError("the request was cancelled", ErrorKind.CANCELLED)))
            elif not self._over and self._has_left():
                self._over = True
                self._farewell_time = time.monotonic() + _FAREWELL_SECONDS
                self._abort()

    def _has_left(self) -> bool:
        try:
            return self._is_cancelled is not None and self._is_cancelled()
        except Exception:
            log.exception("the server cannot say whether a request was cancelled")
            return True

    def poll_deadline(self, now: float) -> None:
        """On the side thread. now: seconds, time.monotonic(). Deadlines hold while the prompt waits to be read and
        while there is no engine, too.
        """
        seconds = min(
            self._request.sampling.request_deadline_seconds or math.inf, self._services.config.request_deadline_seconds
        )
        if now > self._request.arrival + seconds + _DEADLINE_GRACE_SECONDS:
            self.fail(RequestError(f"not finished after {seconds:g} s (request_deadline_seconds)", ErrorKind.CANCELLED))

    def fail(self, error: RequestError) -> None:
        """Ends the request with `error`, here and in the engine; no effect if it is over."""
        with self._lock:
            if not self._over:
                self._end_with(Delta(error=error))
                self._abort()

    def send(self, deltas: tuple[Delta, ...], final: bool) -> None:
        """On a thread that sends. Asking for cancellation during or after the final response crashes Triton Server
        (2.51: the question follows a pointer to what the final response frees), so the final response waits for a
        question under way and forbids the next.
        """
        if final:
            with self._lock:
                self._over = True
                self._is_cancelled = None
        assert self._send is not None
        self._send(deltas, final)

    def ended(self, sent: bool) -> None:
        """On the thread that sent the final response."""
        self._forget(self)
        self._send = None
        with self._lock:
            if not sent:
                self._outcome = reason_of(ErrorKind.INTERNAL)
                self._abort()
        self._record(time.monotonic())

    def _end_with(self, delta: Delta) -> None:
        """The whole answer is over, by an error."""
        assert delta.error is not None
        self._outcome = reason_of(delta.error.kind)
        self._over = True
        self._services.streamer.put(self._channel, msgspec.structs.replace(delta, last=True))

    def _abort(self) -> None:
        for strand in self._strands:
            if strand.request_id is not None and not strand.over:
                self._services.client.abort(strand.request_id)

    def _record(self, now: float) -> None:
        tally, request = self._services.tally, self._request
        if request.task not in ("generate", "embed"):
            return
        num_tokens = sum(strand.num_tokens for strand in self._strands)
        seconds = now - request.arrival
        tally.add("paged_requests_finished_total", label=self._outcome)
        tally.observe("paged_request_seconds", seconds)
        if num_tokens:
            tally.observe("paged_request_generation_tokens", num_tokens)
        longest = max((strand.num_tokens for strand in self._strands), default=0)
        if longest > 1:
            tally.observe(
                "paged_time_per_output_token_seconds", (self._last_token_time - self._first_token_time) / (longest - 1)
            )
        if self._services.spans is not None:
            self._trace(self._services.spans, num_tokens, now)
        if self._services.config.log_requests:
            first = f"first after {self._first_token_time - request.arrival:.3f} s" if num_tokens else "none sent"
            cached = f"({self._strands[0].num_cached_tokens if self._strands else 0} cached)"
            name = request.caller_id[:_LONGEST_NAME] or self._strands_name()
            log.info(
                "request %s %s: %d tokens in %s, %d out, %s, %.3f s",
                name,
                self._outcome,
                self._prompt_len,
                cached,
                num_tokens,
                first,
                seconds,
            )

    def _trace(self, spans: RequestSpans, num_tokens: int, now: float) -> None:
        first, last = (moment or None for moment in (self._first_token_time, self._last_token_time))
        times = Times(self._request.arrival, self._submitted_time, self._admitted_time, first, last, now)
        reasons = [strand.finish_reason for strand in self._strands if strand.finish_reason is not None]
        num_cached_tokens = self._strands[0].num_cached_tokens if self._strands else 0
        spans.record(
            self._request, times, Outcome(self._outcome, reasons, self._prompt_len, num_cached_tokens, num_tokens)
        )

    def _strands_name(self) -> str:
        """For a request without an id of its caller's: where it was, and which it was there."""
        first = self._strands[0].request_id if self._strands else None
        return "-" if first is None else f"{front_end_of(first)}.{number_of(first)}"
