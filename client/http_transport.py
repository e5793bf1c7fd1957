"""Requests over HTTP, by the server's `generate` and `generate_stream` endpoints: its inference endpoint takes no
decoupled model, and tritonclient has no call for these. Closing the connection cancels the request, which the server
notices when it writes the next piece; so a response is read to its very end before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from paged_client.answers import Outputs
from paged_client.errors import PagedError, ServerError, UnreachableError, error_of
from paged_client.question import Question
from paged_client.retry_policy import within

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_READY_SECONDS = 5.0  # for the server to say whether it is
_HEADERS = {"Content-Type": "application/json"}


class HttpTransport:
    """A connection for every request."""

    def __init__(self, url: str, model: str) -> None:
        self._url = urlsplit(url)
        self._path = f"{self._url.path.rstrip('/')}/v2/models/{quote(model, safe='')}"

    def ask(self, question: Question) -> HttpCall:
        return HttpCall(self._connection(), _path(self._path, question), question)

    def is_ready(self) -> bool:
        connection = self._connection()
        connection.timeout = _READY_SECONDS
        try:
            connection.request("GET", f"{self._path}/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "localhost", self._url.port
        if self._url.scheme == "https":
            return http.client.HTTPSConnection(host, port, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port)

    def close(self) -> None:
        pass


class HttpCall:
    def __init__(self, connection: http.client.HTTPConnection, path: str, question: Question) -> None:
        self._connection = connection
        self._path = path
        self._question = question
        self._response: http.client.HTTPResponse | None = None
        self._socket: socket.socket | None = None  # the connection forgets it if the server says that it will close
        self._woken = False
        self._num_running = question.num_sequences

    def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """The next response's outputs, and whether it is the last.

        Raises:
            TimeoutError: it did not come within `seconds`.
            PagedError: the request failed, or `wake` was called.
        """
        try:
            response = self._respond(seconds)
            if not self._question.stream or response.status != 200:
                return _outputs_of(response.read(), response.status), True
            while line := response.readline():
                if line.startswith(b"data:"):
                    outputs = _outputs_of(line[5:], response.status)
                    self._num_running -= _num_finished(outputs)
                    final = self._num_running == 0
                    if final:
                        # nothing that happens now changes the answer
                        with contextlib.suppress(OSError, http.client.HTTPException):
                            response.read()
                    return outputs, final
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error, f"{self._connection.host}:{self._connection.port}") from None
        raise UnreachableError("the server closed the connection before the answer's end")

    def _respond(self, seconds: float | None) -> http.client.HTTPResponse:
        connection = self._connection
        connection.timeout = seconds
        if self._response is None:
            connection.connect()
            self._socket = connection.sock
            if self._woken:  # before there was a socket
                self.wake()
            connection.request("POST", self._path, _body(self._question), _HEADERS)
            self._response = connection.getresponse()
        elif self._socket is not None:
            self._socket.settimeout(seconds)
        return self._response

    def wake(self) -> None:
        """Ends `next`'s waiting as a lost connection would; from anywhere, signal handlers included."""
        self._woken = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own would change what is read

    def close(self) -> None:
        """Cancels the request if it is not over."""
        if self._response is not None:
            self._response.close()
        self._connection.close()


class AsyncHttpTransport:
    def __init__(self, url: str, model: str, max_connections: int = 0) -> None:
        self._max_connections = max_connections
        self._url = url.rstrip("/")
        self._path = f"{url.rstrip('/')}/v2/models/{quote(model, safe='')}"
        self._session: ClientSession | None = None

    def ask(self, question: Question) -> AsyncHttpCall:
        return AsyncHttpCall(self._connected(), _path(self._path, question), question)

    async def is_ready(self) -> bool:
        import aiohttp

        try:
            async with self._connected().get(
                f"{self._path}/ready", timeout=aiohttp.ClientTimeout(total=_READY_SECONDS)
            ) as response:
                return response.status == 200
        except (OSError, asyncio.TimeoutError, aiohttp.ClientError):
            return False

    async def ready_models(self) -> list[str]:
        """See AsyncPagedClient."""
        index = await self._said("POST", "repository/index")
        return [model["name"] for model in index if model.get("state") == "READY"]

    async def inputs_of(self, model: str) -> frozenset[str]:
        """See AsyncPagedClient."""
        metadata = await self._said("GET", f"models/{quote(model, safe='')}")
        return frozenset(tensor["name"] for tensor in metadata["inputs"])

    async def _said(self, method: str, path: str) -> Any:
        import aiohttp

        try:
            async with self._connected().request(
                method, f"{self._url}/v2/{path}", timeout=aiohttp.ClientTimeout(total=_READY_SECONDS)
            ) as response:
                body = await response.read()
        except (OSError, asyncio.TimeoutError, aiohttp.ClientError) as error:
            raise _unreachable(error, self._url) from None
        if response.status != 200:
            raise error_of(f"{self._url} answered {response.status} to {path}", http_status=response.status)
        try:
            return json.loads(body)
        except ValueError:
            raise ServerError(f"{self._url} answered {path} with something that is no JSON") from None

    def _connected(self) -> ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=self._max_connections)
            )
        return self._session

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class AsyncHttpCall:
    def __init__(self, session: ClientSession, path: str, question: Question) -> None:
        self._session = session
        self._path = path
        self._question = question
        self._response: ClientResponse | None = None
        self._num_running = question.num_sequences
        self._lines: AsyncIterator[bytes] | None = None

    async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """As HttpCall.next."""
        import aiohttp

        try:
            return await within(seconds, self._next())
        except TimeoutError:
            raise
        except (OSError, aiohttp.ClientError) as error:
            raise _unreachable(error, urlsplit(self._path).netloc) from None

    async def _next(self) -> tuple[Outputs, bool]:
        from aiohttp import ClientError

        if self._response is None:
            self._response = await self._session.post(self._path, data=_body(self._question), headers=_HEADERS)
            self._lines = _lines_of(self._response)
        response = self._response
        if not self._question.stream or response.status != 200:
            return _outputs_of(await response.read(), response.status), True
        assert self._lines is not None
        async for line in self._lines:
            if line.startswith(b"data:"):
                outputs = _outputs_of(line[5:], response.status)
                self._num_running -= _num_finished(outputs)
                final = self._num_running == 0
                if final:
                    with contextlib.suppress(OSError, ClientError):
                        await response.read()
                return outputs, final
        raise UnreachableError("the server closed the connection before the answer's end")

    def cancel(self) -> None:
        if self._response is not None:
            self._response.close()


async def _lines_of(response: ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length: aiohttp's own reader has a limit."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _path(model_path: str, question: Question) -> str:
    return f"{model_path}/{'generate_stream' if question.stream else 'generate'}"


def _body(question: Question) -> bytes:
    return json.dumps({**question.tensors, **question.parameters}).encode()


def _outputs_of(text: bytes, status: int) -> Outputs:
    """A JSON object of outputs, in which the server writes a list of one element as that element.

    Raises:
        PagedError: it tells of an error.
    """
    said = text.removeprefix(b"data:").strip()  # an error's response is an event too where a stream was asked for
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise error_of(said[:200].decode(errors="replace") or f"HTTP status {status}", http_status=status)
    if "error" in answer or status != 200:
        raise error_of(str(answer.get("error", f"HTTP status {status}")), http_status=status)
    return {name: value if isinstance(value, list) else [value] for name, value in answer.items()}


def _num_finished(outputs: Outputs) -> int:
    """Sequences that this response ends."""
    return sum(reason != "None" for reason in outputs.get("finish_reason", ()))


def _unreachable(error: BaseException, address: str) -> PagedError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ServerError(f"the server's certificate is not trusted: {error.verify_message}")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UnreachableError(f"no Triton Server can be reached at {address}: {reason}")
