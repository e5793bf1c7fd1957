"""Requests over gRPC, one stream each, by tritonclient. Ending the stream's call cancels its request on the server.

A request that is over is never cancelled: Triton Server 2.51 loses track of it now and then, and can then not unload the model.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from paged_client.errors import PagedError, UnreachableError, UnsupportedError, error_of
from paged_client.question import Question
from paged_client.retry_policy import within

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient, InferResult
    from tritonclient.grpc.aio import InferenceServerClient as AsyncInferenceServerClient
    from tritonclient.utils import InferenceServerException

Outputs = dict[str, list[Any]]
_END_SECONDS = 5.0  # for the server to end a stream whose request is over
_READY_SECONDS = 5.0  # for the server to say whether it is
_RESTRICTED = "This protocol is restricted"  # Triton Server's words, with --grpc-restricted-protocol
_BACKOFF_MS = 1000  # between attempts to connect, where somebody waits for a server to come back: two minutes by default
_MAX_MESSAGE_BYTES = 2**31 - 1  # as tritonclient has it


class GrpcTransport:
    """A tritonclient client carries one stream at a time: those that are free are kept, with their connection."""

    def __init__(self, address: str, model: str, ssl: bool) -> None:
        self._address = address
        self._model = model
        self._ssl = ssl
        self._lock = threading.Lock()
        self._free: list[InferenceServerClient] = []
        self._calls: WeakSet[GrpcCall] = WeakSet()
        weakref.finalize(self, _close_all, self._free, self._calls)  # where a program ends without `close`, grpc would wait for threads that have ended

    def ask(self, question: Question) -> GrpcCall:
        call = GrpcCall(self, self._take(), self._model, question)
        self._calls.add(call)
        return call

    def is_ready(self) -> bool:
        from tritonclient.utils import InferenceServerException

        client = self._take()
        try:
            return bool(client.is_model_ready(self._model, client_timeout=_READY_SECONDS))
        except InferenceServerException:
            return False
        finally:
            self.take_back(client)

    def _take(self) -> InferenceServerClient:
        from tritonclient.grpc import InferenceServerClient

        with self._lock:
            return self._free.pop() if self._free else InferenceServerClient(self._address, ssl=self._ssl)

    @property
    def address(self) -> str:
        return self._address

    def take_back(self, client: InferenceServerClient) -> None:
        with self._lock:
            self._free.append(client)

    def close(self) -> None:
        with self._lock:
            _close_all(self._free, ())


def _close_all(clients: list[InferenceServerClient], calls: Iterable[GrpcCall]) -> None:
    for call in list(calls):
        call.close()
    while clients:
        clients.pop().close()


class GrpcCall:
    """One request on its way."""

    def __init__(self, transport: GrpcTransport, client: InferenceServerClient, model: str, question: Question) -> None:
        from tritonclient.utils import InferenceServerException

        self._transport = transport
        self._client: InferenceServerClient | None = client
        self._over = False
        arrived: queue.Queue[tuple[InferResult | None, InferenceServerException | None]] = queue.Queue()
        self._arrived = arrived
        _in_daemon_thread(lambda: client.start_stream(lambda result, error: arrived.put((result, error))))
        try:
            client.async_stream_infer(model, _inputs(question), enable_empty_final_response=True, parameters=dict(question.parameters))
        except InferenceServerException as error:  # the stream broke first: why is in the queue
            if arrived.empty():
                arrived.put((None, error))

    def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """The next response's outputs, and whether it is the last.

        Raises:
            TimeoutError: it did not come within `seconds`.
            PagedError: the request failed.
        """
        try:
            result, error = self._arrived.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None or result is None:
            self._over = True
            raise _error_of(error, self._transport.address)
        self._over = _is_final(result)
        return _outputs_of(result), self._over

    def close(self) -> None:
        """Cancels the request if it is not over."""
        client, self._client = self._client, None
        if client is not None:
            client.stop_stream(cancel_requests=not self._over)
            self._transport.take_back(client)


def _in_daemon_thread(task: Callable[[], None]) -> None:
    """The thread that reads a stream is a daemon as the one that starts it: else a program could not end before its streams."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            task()
        except BaseException as error:  # whatever it is, it is the caller's
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


class AsyncGrpcTransport:
    """One client and connection carries every stream."""

    def __init__(self, address: str, model: str, ssl: bool, keepalive_seconds: float | None = None) -> None:
        """keepalive_seconds: see AsyncPagedClient."""
        self._address = address
        self._model = model
        self._ssl = ssl
        self._keepalive_seconds = keepalive_seconds
        self._client: AsyncInferenceServerClient | None = None

    def ask(self, question: Question) -> AsyncGrpcCall:
        return AsyncGrpcCall(self._connected(), self._model, question, self._address)

    async def is_ready(self) -> bool:
        from tritonclient.utils import InferenceServerException

        try:
            return bool(await self._connected().is_model_ready(self._model, client_timeout=_READY_SECONDS))
        except InferenceServerException:
            return False

    async def ready_models(self) -> list[str]:
        """See AsyncPagedClient."""
        index = await self._said(self._connected().get_model_repository_index(client_timeout=_READY_SECONDS))
        return [model.name for model in index.models if model.state == "READY"]

    async def inputs_of(self, model: str) -> frozenset[str]:
        """See AsyncPagedClient."""
        metadata = await self._said(self._connected().get_model_metadata(model, client_timeout=_READY_SECONDS))
        return frozenset(tensor.name for tensor in metadata.inputs)

    async def _said(self, asking: Awaitable[Any]) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return await asking
        except InferenceServerException as failure:
            if _RESTRICTED in (failure.message() or ""):  # its status is that of a server that cannot be reached
                raise UnsupportedError(f"the server at {self._address} restricts this to those with a key") from None
            raise _error_of(failure, self._address) from None

    def _connected(self) -> AsyncInferenceServerClient:
        from tritonclient.grpc.aio import InferenceServerClient

        if self._client is None:
            self._client = InferenceServerClient(self._address, ssl=self._ssl, channel_args=_channel_options(self._keepalive_seconds))
        return self._client

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()


def _channel_options(keepalive_seconds: float | None) -> list[tuple[str, int]] | None:
    """None: tritonclient's own, which never ask whether a server is there."""
    if keepalive_seconds is None:
        return None
    milliseconds = round(1000 * keepalive_seconds)
    return [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),  # a minute by default, and the timeout above counts for nothing then
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        ("grpc.initial_reconnect_backoff_ms", _BACKOFF_MS),
        ("grpc.max_reconnect_backoff_ms", _BACKOFF_MS),
    ]


class AsyncGrpcCall:
    def __init__(self, client: AsyncInferenceServerClient, model: str, question: Question, address: str) -> None:
        self._address = address
        inputs = _inputs(question)  # what is wrong with them is to be raised here, not inside the library

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": model,
                "inputs": inputs,
                "enable_empty_final_response": True,
                "parameters": dict(question.parameters),
            }

        self._responses: Any = client.stream_infer(requests())
        self._over = False

    async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """As GrpcCall.next."""
        from grpc.aio import AioRpcError
        from tritonclient.utils import InferenceServerException

        try:
            result, error = await within(seconds, anext(self._responses))
        except StopAsyncIteration:
            raise UnreachableError("the server closed the stream before the answer's end") from None
        except AioRpcError as failure:
            raise _rpc_error_of(failure.details() or "", failure.code().name, self._address) from None
        except InferenceServerException as failure:
            raise _error_of(failure, self._address) from None
        self._over = error is not None or _is_final(result)
        if self._over:
            await self._see_the_end()
        if error is not None:
            raise _error_of(error, self._address)
        return _outputs_of(result), self._over

    async def _see_the_end(self) -> None:
        """The server closes the stream after the last response. A call that is dropped before is cancelled by the library."""
        with contextlib.suppress(Exception):  # nothing that happens now changes the answer
            while True:
                await within(_END_SECONDS, anext(self._responses))

    def cancel(self) -> None:
        if not self._over:
            self._responses.cancel()


def _inputs(question: Question) -> list[Any]:
    import numpy as np
    from tritonclient.grpc import InferInput

    made = []
    for name, value in question.tensors.items():
        if isinstance(value, bool):
            array, kind = np.array([value], np.bool_), "BOOL"
        elif isinstance(value, str):
            array, kind = np.array([value.encode()], np.object_), "BYTES"
        else:
            array, kind = np.array(value, np.int32), "INT32"
        made.append(InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
    return made


def _outputs_of(result: InferResult) -> Outputs:
    response = result.get_response()
    arrays = {output.name: result.as_numpy(output.name) for output in response.outputs}
    return {name: [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()] for name, array in arrays.items()}


def _is_final(result: InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def _error_of(error: InferenceServerException | None, address: str) -> PagedError:
    if error is None:
        return UnreachableError(f"the server at {address} sent an empty answer")
    return _rpc_error_of(error.message() or "", str(error.status() or "").removeprefix("StatusCode."), address)


def _rpc_error_of(message: str, code: str, address: str) -> PagedError:
    if code == "UNAVAILABLE":  # of the connection: the model's own refusals come in the stream, without a status
        return UnreachableError(f"no Triton Server can be reached at {address}: {message.rsplit(': ', 1)[-1]}")
    return error_of(message or "the server gave no reason", code=code)
