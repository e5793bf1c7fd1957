"""Requests over gRPC for asyncio: one connection, a stream for each request. Ending a stream cancels its request on the
server.

A gateway passes every piece of every answer through here, so messages are read as they are, without tritonclient's
objects around them: it lends their definitions alone (`service_pb2`), as KServe's protocol has them.

A request that is over is never cancelled: Triton Server 2.51 loses track of it now and then, and can then not unload
the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from paged_client.answers import Outputs
from paged_client.errors import UnreachableError, UnsupportedError, error_of
from paged_client.grpc_transport import CHANNEL_OPTIONS, rpc_error_of
from paged_client.question import Question
from paged_client.unabandoned import Unabandoned

if TYPE_CHECKING:
    from grpc.aio import Channel

_SERVICE = "/inference.GRPCInferenceService"
_END_SECONDS = 5.0  # for the server to end a stream whose request is over
_READY_SECONDS = 5.0  # for the server to say whether it is
_RESTRICTED = "This protocol is restricted"  # Triton Server's words, with --grpc-restricted-protocol
# KServe's names of types → struct's
_FORMATS = {"BOOL": "?", "INT32": "i", "UINT32": "I", "INT64": "q", "UINT64": "Q", "FP32": "f", "FP64": "d"}


class AsyncGrpcTransport:
    """One connection carries every stream."""

    def __init__(self, address: str, model: str, ssl: bool, keepalive_seconds: float | None = None) -> None:
        """keepalive_seconds: see AsyncPagedClient."""
        self._address = address
        self._model = model
        self._ssl = ssl
        self._options = _channel_options(keepalive_seconds)
        self._channel: Channel | None = None
        self._open_stream: Any = None

    def ask(self, question: Question) -> AsyncGrpcCall:
        request = _request_of(self._model, question)  # what is wrong with it is to be raised before anything is opened
        self._connected()
        return AsyncGrpcCall(self._open_stream(), request, self._address)

    async def is_ready(self) -> bool:
        from grpc.aio import AioRpcError
        from tritonclient.grpc import service_pb2

        try:
            return bool(
                (
                    await self._asked(
                        "ModelReady", service_pb2.ModelReadyRequest(name=self._model), service_pb2.ModelReadyResponse
                    )
                ).ready
            )
        except AioRpcError:
            return False

    async def ready_models(self) -> list[str]:
        """See AsyncPagedClient."""
        from tritonclient.grpc import service_pb2

        index = await self._said(
            "RepositoryIndex", service_pb2.RepositoryIndexRequest(), service_pb2.RepositoryIndexResponse
        )
        return [model.name for model in index.models if model.state == "READY"]

    async def inputs_of(self, model: str) -> frozenset[str]:
        """See AsyncPagedClient."""
        from tritonclient.grpc import service_pb2

        metadata = await self._said(
            "ModelMetadata", service_pb2.ModelMetadataRequest(name=model), service_pb2.ModelMetadataResponse
        )
        return frozenset(tensor.name for tensor in metadata.inputs)

    async def _said(self, method: str, request: Any, response: Any) -> Any:
        from grpc.aio import AioRpcError

        try:
            return await self._asked(method, request, response)
        except AioRpcError as failure:
            if _RESTRICTED in (failure.details() or ""):  # its status is that of a server that cannot be reached
                raise UnsupportedError(f"the server at {self._address} restricts this to those with a key") from None
            raise rpc_error_of(failure.details() or "", failure.code().name, self._address) from None

    async def _asked(self, method: str, request: Any, response: Any) -> Any:
        """The answer of one that is not streamed. response: its class."""
        asks = self._connected().unary_unary(
            f"{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await asks(request, timeout=_READY_SECONDS)

    def _connected(self) -> Channel:
        import grpc
        from tritonclient.grpc import service_pb2

        if self._channel is None:
            if self._ssl:
                self._channel = grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials(), self._options)
            else:
                self._channel = grpc.aio.insecure_channel(self._address, self._options)
            self._open_stream = self._channel.stream_stream(
                f"{_SERVICE}/ModelStreamInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )
        return self._channel

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


def _channel_options(keepalive_seconds: float | None) -> list[tuple[str, int]]:
    """None: nobody asks whether a server is there."""
    if keepalive_seconds is None:
        return CHANNEL_OPTIONS
    milliseconds = round(1000 * keepalive_seconds)
    return [
        *CHANNEL_OPTIONS,
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        # a minute by default, and the timeout above counts for nothing then
        ("grpc.http2.ping_timeout_ms", milliseconds),
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
    ]


class AsyncGrpcCall:
    """One request on its way. One task asks for its responses."""

    def __init__(self, call: Any, request: Any, address: str) -> None:
        """call: an open ModelStreamInfer. request: a ModelInferRequest, sent with the first `next`."""
        import grpc.aio

        self._call = call
        self._request = request
        self._address = address
        self._over = False
        self._patience = _Patience(call)
        self._reader = _ResponseReader()
        self._grpc = grpc.aio  # an import at each piece would cost two microseconds

    async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        """As GrpcCall.next."""
        try:
            message = await self._read(seconds)
        except self._grpc.AioRpcError as failure:
            self._patience.end()
            raise rpc_error_of(failure.details() or "", failure.code().name, self._address) from None
        if message is self._grpc.EOF:
            self._patience.end()
            raise UnreachableError("the server closed the stream before the answer's end")
        error = message.error_message
        outputs, final = ({}, True) if error else self._reader.read(message.infer_response)
        if final:
            self._over = True
            await self._see_the_end()
        if error:
            raise error_of(error)
        return outputs, final

    async def _read(self, seconds: float | None) -> Any:
        """The next message, or EOF.

        Raises:
            TimeoutError: it did not come within `seconds`; the request is cancelled.
        """
        request, self._request = self._request, None
        self._patience.begin(seconds)
        try:
            if request is not None:
                with contextlib.suppress(asyncio.InvalidStateError):  # it has failed already: reading says why
                    await Unabandoned(self._call.write(request), self._call.cancel)
                    await self._call.done_writing()
            return await Unabandoned(self._call.read(), self._call.cancel)
        except asyncio.CancelledError:
            if self._patience.is_over:
                raise TimeoutError from None
            self._patience.end()
            raise
        finally:
            self._patience.pause()

    async def _see_the_end(self) -> None:
        """The server closes the stream after the last response. A call that is dropped before is cancelled by the
        library.
        """
        with contextlib.suppress(Exception):  # nothing that happens now changes the answer
            while await self._read(_END_SECONDS) is not self._grpc.EOF:
                pass
        self._patience.end()

    def cancel(self) -> None:
        self._patience.end()
        if not self._over:
            self._call.cancel()


class _Patience:
    """Cancels a call that a reader has waited for too long. One timer a call, which is looked at again where it was
    early: one a piece would cost more than the piece.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()  # which is a system call at each piece, before Python 3.12
        self._deadline = math.inf  # loop.time(); inf: nobody waits
        self._timer: asyncio.TimerHandle | None = None
        self.is_over = False

    def begin(self, seconds: float | None) -> None:
        if seconds is None:
            return
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._set()

    def pause(self) -> None:
        self._deadline = math.inf

    def end(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _set(self) -> None:
        self.end()
        self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() >= self._deadline:
            self.is_over = True
            self._call.cancel()
        elif self._deadline < math.inf:
            self._set()


def _request_of(model: str, question: Question) -> Any:
    """A ModelInferRequest."""
    import numpy as np
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in question.tensors.items():
        if isinstance(value, bool):
            kind, length, raw = "BOOL", 1, bytes([value])
        elif isinstance(value, str):
            encoded = value.encode()
            kind, length, raw = "BYTES", 1, len(encoded).to_bytes(4, "little") + encoded
        else:
            kind, length, raw = "INT32", len(value), np.array(value, "<i4").tobytes()
        request.inputs.add(name=name, datatype=kind, shape=[length])
        request.raw_input_contents.append(raw)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in question.parameters.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        else:
            request.parameters[name].string_param = value
    return request


class _ResponseReader:
    """Reads one stream's responses. Most differ from the one before in nothing but the values: that is told by one
    comparison of bytes, where looking at each name, type and shape would take several times as long.
    """

    def __init__(self) -> None:
        self._head = b""  # the response before, without its values
        self._is_final = False
        self._columns: tuple[tuple[str, Callable[[bytes], Sequence[Any]]], ...] = ()

    def read(self, response: Any) -> tuple[Outputs, bool]:
        """Name → values of a ModelInferResponse, whose raw contents are taken out, and whether it is the last."""
        contents = response.raw_output_contents
        values = list(contents)
        del contents[:]
        head = response.SerializeToString()
        if head != self._head:
            self._head = head
            self._is_final = response.parameters["triton_final_response"].bool_param
            self._columns = tuple(
                (output.name, _values_of(output.datatype, math.prod(output.shape))) for output in response.outputs
            )
        outputs = {name: values_of(raw) for (name, values_of), raw in zip(self._columns, values, strict=True)}
        return outputs, self._is_final


@lru_cache(1024)  # there may be a count for each length of a prompt
def _values_of(datatype: str, count: int) -> Callable[[bytes], Sequence[Any]]:
    """What reads so many values from their bytes.

    Raises:
        KeyError: no output has such a type.
    """
    if datatype == "BYTES":
        return _string if count == 1 else _strings
    return struct.Struct(f"<{count}{_FORMATS[datatype]}").unpack


def _string(raw: bytes) -> list[str]:
    """As `_strings`, of one."""
    return [raw[4:].decode(errors="replace")]


def _strings(raw: bytes) -> list[str]:
    """Each has its length in four bytes before it."""
    found, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : end].decode(errors="replace"))
        at = end
    return found
