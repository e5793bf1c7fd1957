"""`PagedClient`: ask a model that paged serves, over gRPC or HTTP, from ordinary code. See async_client.py for
asyncio.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from paged_client.answers import Answer, Delta, Outputs
from paged_client.errors import PagedError
from paged_client.grpc_transport import GrpcTransport
from paged_client.http_transport import HttpTransport
from paged_client.progress import Progress
from paged_client.question import Messages, Prompt, Question, question_of, task_question
from paged_client.retry_policy import Limits, RetryPolicy

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "paged_llm"


class _Call(Protocol):
    def next(self, seconds: float | None) -> tuple[Outputs, bool]: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class _Transport(Protocol):
    def ask(self, question: Question) -> _Call: ...
    def is_ready(self) -> bool: ...
    def close(self) -> None: ...


class PagedClient:
    """Thread-safe; every request has a stream or connection of its own.

    with PagedClient("localhost:8001") as client:
        print(client.generate("Once upon a time", max_tokens=40).text)
        for delta in client.stream("Once upon a time", temperature=0.8, seed=7):
            print(delta.text, end="", flush=True)
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout: float | None = 600.0,
        delta_timeout: float | None = None,
        retries: int = 2,
    ) -> None:
        """
        url: HOST:PORT or grpc://HOST:PORT (grpcs:// with TLS) of the gRPC service, or http(s)://HOST:PORT of the HTTP
        service. timeout, delta_timeout: longest time in seconds for a whole answer, and for each next piece of it;
        None: no limit.
        retries: how often a request is sent again that was refused with UNAVAILABLE (or never reached a server) before
            its first token.

        Raises:
            ValueError: the URL is none of these.
        """
        scheme, address = parse_url(url)
        self._limits = Limits(timeout, delta_timeout, retries)
        self._transport: _Transport = (
            HttpTransport(f"{scheme}://{address}", model)
            if scheme.startswith("http")
            else GrpcTransport(address, model, ssl=scheme == "grpcs")
        )

    def __enter__(self) -> PagedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that no stream uses."""
        self._transport.close()

    def is_ready(self) -> bool:
        """Whether the server is there and has loaded the model."""
        return self._transport.is_ready()

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Answer:
        """The whole answer in one response.

        prompt: text, or token ids. messages: a conversation instead, for the model's chat template; tools go to the
        template too.
        request_id: what the server's log calls the request, where the tunable log_requests is on.
        sampling: any of the model's sampling keys, such as max_tokens=64, temperature=0, stop=["\\n"], seed=7. With n=3
        the answer has three `sequences`.

        Raises:
            PagedError: a subclass says what kind of failure it is.
        """
        question = question_of(
            prompt,
            sampling,
            stream=False,
            messages=messages,
            tools=tools,
            continue_final_message=continue_final_message,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        with Stream(self._transport, question, self._limits) as stream:
            for _ in stream:
                pass
        return stream.answer

    def embed(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Answer:
        """The prompt's embedding, as `Answer.embedding`.

        sampling: pooling="last" or "mean", dimensions=N, normalize=False, and the keys that change a prompt.

        Raises:
            PagedError: a subclass says what kind of failure it is.
        """
        question = task_question(
            "embed", prompt, None if messages is None else {"messages": messages}, sampling, cache_salt, request_id
        )
        with Stream(self._transport, question, self._limits) as stream:
            for _ in stream:
                pass
        return stream.answer

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Stream:
        """The answer piece by piece; arguments as for `generate`. Leaving the iterator early (`break`, `close`, an
        exception) cancels the request.

        With n=3 pieces of three sequences come as they are ready: `Delta.sequence_index` says whose each is. Errors are
        raised while iterating.
        """
        question = question_of(
            prompt,
            sampling,
            stream=True,
            messages=messages,
            tools=tools,
            continue_final_message=continue_final_message,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        return Stream(self._transport, question, self._limits)


class Stream:
    """An answer on its way: an iterator of `Delta`. Also a context manager; `close` cancels what is not over, and
    `stop` does so from elsewhere.
    """

    _call: _Call | None = None  # of the class, too: an interrupted `__init__` is followed by `__del__`

    def __init__(self, transport: _Transport, question: Question, limits: Limits) -> None:
        self._transport = transport
        self._question = question
        self._retry_policy = RetryPolicy(limits)
        self._progress = Progress()
        self._arrived: deque[Delta] = deque()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    @property
    def answer(self) -> Answer:
        """Everything that has come so far."""
        return self._progress.answer

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        while not (self._arrived or self._progress.over or self._stopped):
            try:
                self._listen()
            except BaseException:
                self.close()
                raise
        if self._stopped:
            self.close()
        if self._arrived:
            return self._arrived.popleft()
        raise StopIteration

    def _listen(self) -> None:
        """Takes the next response, or pauses before another attempt."""
        try:
            if self._call is None:
                self._call = self._transport.ask(self._question)
            if self._stopped:  # before there was a call to wake
                return
            outputs, final = self._call.next(self._retry_policy.seconds())
        except PagedError as error:
            if self._stopped:  # which looks like a lost connection
                return
            pause = self._retry_policy.pause(error, begun=self._progress.begun)
            if pause is None:
                raise
            self._leave()
            time.sleep(pause)
            return
        except TimeoutError:
            raise self._retry_policy.over() from None
        self._arrived.extend(self._progress.take(outputs, final))
        if final:
            self._leave()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._leave()

    def close(self) -> None:
        """Ends the iteration; a request that is not over is cancelled on the server."""
        self._progress.over = True
        self._arrived.clear()
        self._leave()

    def stop(self) -> None:
        """Ends the iteration from another thread or a signal handler: waits for nothing, and wakes who waits for the
        next piece. The one that iterates gets no more pieces, and cancels the request. A connection over HTTP that is
        still being made is waited for.
        """
        self._stopped = True
        call = self._call
        if call is not None:
            call.wake()

    def _leave(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.close()


def parse_url(url: str) -> tuple[str, str]:
    """(scheme, address without it); a bare HOST:PORT is gRPC.

    Raises:
        ValueError: another scheme, or no host.
    """
    scheme, separator, address = url.rpartition("://")
    scheme = scheme.lower() if separator else "grpc"
    address = address.rstrip("/")
    if scheme not in ("grpc", "grpcs", "http", "https") or not address or any(letter.isspace() for letter in address):
        raise ValueError(f"'{url}' is no URL of a server: expected HOST:PORT, grpc://HOST:PORT or http://HOST:PORT")
    return scheme, address
