"""Requests over gRPC, one stream each, by tritonclient. Ending the stream's call cancels its request on the server.

A request that is over is never cancelled: Triton Server 2.51 loses track of it now and then, and can then not unload
the model.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from paged_client.answers import Outputs
from paged_client.errors import PagedError, UnreachableError, error_of
from paged_client.question import Question

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient, InferResult
    from tritonclient.utils import InferenceServerException

_READY_SECONDS = 5.0  # for the server to say whether it is
_BACKOFF_MS = 1000
_MAX_MESSAGE_BYTES = 2**31 - 1  # as tritonclient has it
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # between attempts to connect, where somebody waits for a server to come back: two minutes by default
    ("grpc.initial_reconnect_backoff_ms", _BACKOFF_MS),
    ("grpc.max_reconnect_backoff_ms", _BACKOFF_MS),
]


class GrpcTransport:
    """A tritonclient client carries one stream at a time: those that are free are kept, with their connection."""

    def __init__(self, address: str, model: str, ssl: bool) -> None:
        self._address = address
        self._model = model
        self._ssl = ssl
        self._lock = threading.Lock()
        self._free: list[InferenceServerClient] = []
        self._calls: WeakSet[GrpcCall] = WeakSet()
        # where a program ends without `close`, grpc would wait for threads that have ended
        weakref.finalize(self, _close_all, self._free, self._calls)

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
            return (
                self._free.pop()
                if self._free
                else InferenceServerClient(self._address, ssl=self._ssl, channel_args=CHANNEL_OPTIONS)
            )

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
        # A SimpleQueue's lock cannot stay taken where KeyboardInterrupt is raised, as a Queue's can; and a signal
        # handler may put something into it, whatever it interrupts. None: nothing came, see `wake`.
        arrived: queue.SimpleQueue[tuple[InferResult | None, InferenceServerException | None] | None]
        self._arrived = arrived = queue.SimpleQueue()
        try:
            _in_daemon_thread(lambda: client.start_stream(lambda result, error: arrived.put((result, error))))
            client.async_stream_infer(
                model, _inputs(question), enable_empty_final_response=True, parameters=dict(question.parameters)
            )
        except InferenceServerException as error:  # the stream broke first: why is in the queue
            if arrived.empty():
                arrived.put((None, error))
        except BaseException:  # KeyboardInterrupt: the request may be on its way
            self.close()
            raise

    def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """The next response's outputs, and whether it is the last. No outputs after `wake`.

        Raises:
            TimeoutError: it did not come within `seconds`.
            PagedError: the request failed.
        """
        try:
            item = self._arrived.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if item is None:
            return {}, False
        result, error = item
        if error is not None or result is None:
            self._over = True
            raise _error_of(error, self._transport.address)
        self._over = _is_final(result)
        return _outputs_of(result), self._over

    def wake(self) -> None:
        """Ends `next`'s waiting; from anywhere, signal handlers included."""
        self._arrived.put(None)

    def close(self) -> None:
        """Cancels the request if it is not over."""
        client, self._client = self._client, None
        if client is not None:
            client.stop_stream(cancel_requests=not self._over)
            self._transport.take_back(client)


def _in_daemon_thread(task: Callable[[], None]) -> None:
    """The thread that reads a stream is a daemon as the one that starts it: else a program could not end before its
    streams.
    """
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
    return {
        name: [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
        for name, array in arrays.items()
    }


def _is_final(result: InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def _error_of(error: InferenceServerException | None, address: str) -> PagedError:
    if error is None:
        return UnreachableError(f"the server at {address} sent an empty answer")
    return rpc_error_of(error.message() or "", str(error.status() or "").removeprefix("StatusCode."), address)


def rpc_error_of(message: str, code: str, address: str) -> PagedError:
    if code == "UNAVAILABLE":  # of the connection: the model's own refusals come in the stream, without a status
        return UnreachableError(f"no Triton Server can be reached at {address}: {message.rsplit(': ', 1)[-1]}")
    return error_of(message or "the server gave no reason", code=code)
