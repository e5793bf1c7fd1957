"""A front end: one request after another from text to final response. Joins prompt, engine, detokenizer and streamer; knows no server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from paged_backend.config import EngineConfig
from paged_backend.detokenizer import AnswerText
from paged_backend.engine_client import EngineClient, Piece
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.metrics import Tally
from paged_backend.prompt import Prompt, PromptReader
from paged_backend.request import Delta, Finish, Request
from paged_backend.streamer import Channel, Send, Streamer

_CANCEL_POLL_SECONDS = 0.025
_CANCEL_POLL_SHARE = 0.2  # of one thread's time: asking is a round trip for each live request
_CONTEXT_TOKENS = 256  # of the prompt, that the detokenizer may look at
_DRAIN_SECONDS = 20.0  # the server gives all instances together 30 s to stop

log = logging.getLogger("paged")


class FrontEnd:
    """Thread-safe. `ask` returns at once; the answer goes out on the streamer's threads."""

    def __init__(self, config: EngineConfig, key: str, num_front_ends: int, command: Sequence[str] | None = None) -> None:
        """Returns when the engine is ready. See EngineClient.connect.

        Raises:
            EngineError: the engine cannot start.
        """
        self.config = config
        self.client = EngineClient.connect(config, key, num_front_ends, command)
        try:
            self.prompts = PromptReader(config, self.client.ready)
        except BaseException:
            self.client.close()
            raise
        self.tally = Tally(config, self.client.ready)
        self.streamer = Streamer(config.stream_max_delay_ms / 1000)
        self._answers: dict[int, _Answer] = {}  # by id(answer); from arrival to final response
        self._open = True
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cancel", daemon=True)
        self.client.start(self.tally.take_stats)
        self._watcher.start()

    @property
    def alive(self) -> bool:
        return self._open and self.client.alive

    def token_text(self, token_id: int) -> str:
        """One token by itself, special ones too; "" without a tokenizer."""
        return "" if self.prompts.tokenizer is None else self.prompts.tokenizer.decode([token_id], skip_special_tokens=False)

    def ask(self, request: Request, send: Send, is_cancelled: Callable[[], bool]) -> None:
        """Answers `request` by calls of `send` from other threads: deltas, the last one final, whatever happens.

        is_cancelled: asked every few tens of milliseconds, never during or after the final call of `send`; True ends the request.
        """
        answer = _Answer(self, request, send, is_cancelled)
        eager = self.prompts.tokenizer is None or request.outputs.output_ids or request.outputs.logprobs
        answer.channel = self.streamer.open(answer.send, answer.ended, request.stream, eager)
        self._answers[id(answer)] = answer
        if self._open:
            self.prompts.later(answer.begin)
        else:
            answer.fail(RequestError("the model is being unloaded", ErrorKind.OVERLOADED))

    def refuse(self, error: RequestError, send: Send) -> None:
        """Answers a request that could not even be read."""
        channel = self.streamer.open(send, lambda _: self.tally.add("paged_requests_finished_total", label="error"), stream=False)
        self.streamer.put(channel, Delta(error=error))

    def close(self, drain_seconds: float = _DRAIN_SECONDS) -> None:
        """Takes no more requests, waits for the live ones, ends those that are left, and leaves the engine."""
        self._open = False
        if not self.streamer.wait_until_all_ended(drain_seconds):
            for answer in list(self._answers.values()):
                answer.fail(RequestError("the model is being unloaded", ErrorKind.OVERLOADED))
            self.streamer.wait_until_all_ended(1.0)
        self._stopping.set()
        self._watcher.join()
        self.prompts.close()
        self.streamer.close()
        self.client.close()

    def forget(self, answer: _Answer) -> None:
        self._answers.pop(id(answer), None)

    def _watch(self) -> None:
        """The side thread: asks the server who has left."""
        spent = 0.0
        while not self._stopping.wait(max(_CANCEL_POLL_SECONDS, spent / _CANCEL_POLL_SHARE)):
            started = time.monotonic()
            for answer in list(self._answers.values()):
                answer.poll_cancellation()
            spent = time.monotonic() - started


class _Answer:
    """One request on its way: read → submitted → pieces → final response. Its lock orders the threads that it passes through."""

    def __init__(self, front_end: FrontEnd, request: Request, send: Send, is_cancelled: Callable[[], bool]) -> None:
        self.channel: Channel
        self._text: AnswerText
        self._send: Send | None = send
        self._front_end = front_end
        self._request = request
        self._is_cancelled: Callable[[], bool] | None = is_cancelled
        self._lock = threading.Lock()
        self._request_id: int | None = None  # once submitted
        self._over = False
        self._prompt_len = 0
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._cumulative_logprob = 0.0
        self._first_token_time = 0.0
        self._last_token_time = 0.0
        self._outcome = "error"

    def begin(self) -> None:
        """On a prompt thread: tokenises and submits."""
        if self._over:
            return
        try:
            prompt = self._front_end.prompts.read(self._request)
            with self._lock:
                if not self._over:
                    self._submit(prompt)
        except RequestError as error:
            self.fail(error)
        except Exception:
            log.exception("a prompt could not be read")
            self.fail(RequestError("the prompt could not be read", ErrorKind.INTERNAL))

    def _submit(self, prompt: Prompt) -> None:
        request = self._request
        self._prompt_len = len(prompt.token_ids)
        self._text = AnswerText(self._front_end.prompts.tokenizer, prompt.token_ids[-_CONTEXT_TOKENS:].tolist(), prompt.sampling)
        if request.prepend_prompt:
            self._front_end.streamer.put(self.channel, Delta(text=self._front_end.prompts.text_of(request)))
        self._request_id = self._front_end.client.submit(prompt, request.cache_salt, request.arrival, self._receive)

    def _receive(self, piece: Piece) -> None:
        """On the engine client's thread."""
        try:
            with self._lock:
                if not self._over:
                    self._take(piece)
        except Exception:
            log.exception("a piece of an answer could not be read")
            self.fail(RequestError("the answer could not be decoded", ErrorKind.INTERNAL))

    def _take(self, piece: Piece) -> None:
        finish = piece.finish
        passage = self._text.add(piece.token_ids, None if finish is None else finish.reason)
        self._count(piece, passage.num_tokens)
        if passage.stopped:
            finish = Finish(0, "stop")
            if piece.finish is None and self._request_id is not None:
                self._front_end.client.abort(self._request_id)
        wanted = self._request.sampling.logprobs is not None
        logprobs = tuple(piece.logprobs[: passage.num_tokens]) if wanted else ()
        self._cumulative_logprob += sum(next(iter(entry.values())) for entry in logprobs)
        delta = Delta(
            text=passage.text,
            token_ids=tuple(piece.token_ids[: passage.num_tokens]),
            logprobs=logprobs,
            cumulative_logprob=self._cumulative_logprob,
            num_input_tokens=self._prompt_len,
            num_cached_tokens=self._num_cached_tokens,
            finish_reason=None if finish is None or finish.error is not None else finish.reason,
            error=None if finish is None or finish.error is None else RequestError(finish.message, finish.error),
        )
        self._put(delta)

    def _count(self, piece: Piece, num_tokens: int) -> None:
        if piece.num_cached_tokens is not None:
            self._num_cached_tokens = piece.num_cached_tokens
        if not num_tokens:
            return
        tally = self._front_end.tally
        self._last_token_time = time.monotonic()
        if not self._num_tokens:
            self._first_token_time = self._last_token_time
            tally.observe("paged_time_to_first_token_seconds", self._first_token_time - self._request.arrival)
            tally.add("paged_prompt_tokens_total", self._prompt_len)
        self._num_tokens += num_tokens
        tally.add("paged_generation_tokens_total", num_tokens)

    def poll_cancellation(self) -> None:
        """On the side thread."""
        with self._lock:
            if self._over or self._is_cancelled is None:
                return
            try:
                left = self._is_cancelled()
            except Exception:
                log.exception("the server cannot say whether a request was cancelled")
                left = True
            if left:
                self._put(Delta(error=RequestError("the request was cancelled", ErrorKind.CANCELLED)))
                self._abort()

    def send(self, delta: Delta, final: bool) -> None:
        """On a sender thread. Asking for cancellation during or after the final response crashes Triton Server (2.51: the question follows a
        pointer to what the final response frees), so the final response waits for a question under way and forbids the next.
        """
        if final:
            with self._lock:
                self._over = True
                self._is_cancelled = None
        assert self._send is not None
        self._send(delta, final)

    def fail(self, error: RequestError) -> None:
        """Ends the request with `error`, here and in the engine; no effect if it is over."""
        with self._lock:
            if not self._over:
                self._put(Delta(error=error))
                self._abort()

    def _abort(self) -> None:
        if self._request_id is not None:
            self._front_end.client.abort(self._request_id)

    def _put(self, delta: Delta) -> None:
        if delta.finish_reason is not None:
            self._outcome = delta.finish_reason
        elif delta.error is not None:
            self._outcome = "cancelled" if delta.error.kind is ErrorKind.CANCELLED else "error"
        self._over = delta.finish_reason is not None or delta.error is not None
        self._front_end.streamer.put(self.channel, delta)

    def ended(self, sent: bool) -> None:
        """On a sender thread, after the final response."""
        self._front_end.forget(self)
        self._send = None
        with self._lock:
            if not sent:
                self._outcome = "error"
                self._abort()
        self._record(time.monotonic())

    def _record(self, now: float) -> None:
        tally = self._front_end.tally
        seconds = now - self._request.arrival
        tally.add("paged_requests_finished_total", label=self._outcome)
        tally.observe("paged_request_seconds", seconds)
        if self._num_tokens > 1:
            tally.observe("paged_time_per_output_token_seconds", (self._last_token_time - self._first_token_time) / (self._num_tokens - 1))
        if self._front_end.config.log_requests:
            first = f"first after {self._first_token_time - self._request.arrival:.3f} s" if self._num_tokens else "none sent"
            cached = f"({self._num_cached_tokens} cached)"
            log.info("request %s: %d tokens in %s, %d out, %s, %.3f s", self._outcome, self._prompt_len, cached, self._num_tokens, first, seconds)
