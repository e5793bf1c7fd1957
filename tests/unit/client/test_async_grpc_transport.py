"""The gateway's way to a server, over real gRPC to a server of a few lines: values, ends, errors, patience, and who is
cancelled when.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

import grpc
from tritonclient.grpc import service_pb2 as pb

from paged_client import AnswerTimeoutError, AsyncPagedClient, InvalidRequestError, UnreachableError
from paged_client.openai.serving import listen

SERVICE = "inference.GRPCInferenceService"


def message(final: bool = False, **outputs: tuple[str, Any]) -> Any:
    """outputs: name → (type, values)."""
    inner = pb.ModelInferResponse()
    for name, (kind, values) in outputs.items():
        inner.outputs.add(name=name, datatype=kind, shape=[len(values)])
        if kind == "BYTES":
            raw = b"".join(len(value).to_bytes(4, "little") + value for value in values)
        else:
            raw = np.array(values, {"INT32": "<i4", "UINT32": "<u4", "FP32": "<f4"}[kind]).tobytes()
        inner.raw_output_contents.append(raw)
    inner.parameters["triton_final_response"].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=inner)


def piece(text: bytes, reason: bytes = b"None", final: bool = False) -> Any:
    return message(
        final,
        text_output=("BYTES", [text]),
        output_ids=("INT32", [7]),
        finish_reason=("BYTES", [reason]),
        num_input_tokens=("UINT32", [5]),
    )


class Server(grpc.GenericRpcHandler):
    def __init__(self, answer: Callable[[Any], AsyncIterator[Any]]) -> None:
        self._answer = answer
        self.asked: list[Any] = []
        self.num_cancelled = 0

    def service(self, details: Any) -> Any:
        if details.method != f"/{SERVICE}/ModelStreamInfer":
            return None
        return grpc.stream_stream_rpc_method_handler(
            self._infer,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )

    async def _infer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        try:
            async for request in requests:
                self.asked.append(request)
                async for response in self._answer(context):
                    yield response
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def talk(
    answer: Callable[[Any], AsyncIterator[Any]], use: Callable[[AsyncPagedClient], Awaitable[Any]], **options: Any
) -> tuple[Any, Server]:
    """What `use` returns of a client of a server that answers so."""

    async def run() -> tuple[Any, Server]:
        handler, server = Server(answer), grpc.aio.server()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with AsyncPagedClient(f"127.0.0.1:{port}", retries=0, **options) as client:
                found = await use(client)
                await asyncio.sleep(0.05)
            return found, handler
        finally:
            await server.stop(None)

    return asyncio.run(run())


async def whole(context: Any) -> AsyncIterator[Any]:
    yield piece(b"One ")
    yield piece(b"two\xff.", b"stop", final=True)


async def silent(context: Any) -> AsyncIterator[Any]:
    yield piece(b"One ")
    await asyncio.sleep(60)


def test_an_answer_is_read_and_its_stream_is_left_to_end_by_itself() -> None:
    async def use(client: AsyncPagedClient) -> Any:
        return await client.generate("Hi ☃", max_tokens=3)

    answer, server = talk(whole, use)
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.usage.num_input_tokens) == (
        "One two�.",
        (7, 7),
        "stop",
        5,
    )
    (request,) = server.asked
    given = dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=True))
    assert given["text_input"][4:].decode() == "Hi ☃" and given["stream"] == b"\0"
    assert (
        request.parameters["triton_enable_empty_final_response"].bool_param
        and request.parameters["return_error_code"].bool_param
    )
    assert server.num_cancelled == 0


def test_numbers_of_every_type_are_read() -> None:
    async def numbers(context: Any) -> AsyncIterator[Any]:
        yield message(
            True,
            text_output=("BYTES", [b""]),
            finish_reason=("BYTES", [b"stop"]),
            embedding=("FP32", [0.5, -2.0]),
            output_ids=("INT32", []),
        )

    answer, server = talk(numbers, lambda client: client.embed([5, 2**31 - 1]))
    assert answer.embedding == (0.5, -2.0)
    given = dict(
        zip((tensor.name for tensor in server.asked[0].inputs), server.asked[0].raw_input_contents, strict=True)
    )
    assert np.frombuffer(given["input_ids"], "<i4").tolist() == [5, 2**31 - 1]


def test_an_error_in_the_stream_has_its_kind() -> None:
    async def refuses(context: Any) -> AsyncIterator[Any]:
        yield pb.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: max_tokens: expected int >= 1, got 0")

    with pytest.raises(InvalidRequestError, match="^max_tokens: expected int >= 1") as caught:
        talk(refuses, lambda client: client.generate("x"))
    assert caught.value.field == "max_tokens"


def test_a_stream_that_breaks_says_so() -> None:
    async def ends(context: Any) -> AsyncIterator[Any]:
        yield piece(b"One ")

    async def fails(context: Any) -> AsyncIterator[Any]:
        yield piece(b"One ")
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    for answer, words in (
        (ends, "closed the stream before the answer's end"),
        (fails, "no Triton Server can be reached"),
    ):
        with pytest.raises(UnreachableError, match=words):
            talk(answer, lambda client: client.generate("x"))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]

    async def ask() -> None:
        async with AsyncPagedClient(f"127.0.0.1:{port}", retries=0) as client:
            assert not await client.is_ready()
            await client.generate("x")

    with pytest.raises(UnreachableError, match="no Triton Server can be reached"):
        asyncio.run(ask())


@pytest.mark.parametrize("options", [{"timeout": 0.3}, {"delta_timeout": 0.3}], ids=["whole", "piece"])
def test_a_silent_server_is_given_up_and_its_request_cancelled(options: dict[str, float]) -> None:
    async def use(client: AsyncPagedClient) -> list[str]:
        stream = client.stream("x")
        texts = [(await anext(stream)).text]
        with pytest.raises(AnswerTimeoutError):
            await anext(stream)
        return texts

    texts, server = talk(silent, use, **options)
    assert texts == ["One "] and server.num_cancelled == 1


def test_pieces_that_come_in_time_are_never_cut_off() -> None:
    """The timer of the first is early for the others."""

    async def slow(context: Any) -> AsyncIterator[Any]:
        for _ in range(6):
            yield piece(b"x")
            await asyncio.sleep(0.1)
        yield piece(b"end", b"stop", final=True)

    answer, _ = talk(slow, lambda client: client.generate("x"), delta_timeout=0.4)
    assert answer.text == "xxxxxxend"


def test_a_caller_who_leaves_cancels_the_request_and_only_then() -> None:
    async def leave(client: AsyncPagedClient) -> None:
        async with client.stream("x") as stream:
            async for _ in stream:
                break

    async def cancel(client: AsyncPagedClient) -> None:
        task = asyncio.ensure_future(client.generate("x"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for use in (leave, cancel):
        assert talk(silent, use)[1].num_cancelled == 1


def test_first_pieces_do_not_wait_for_an_acknowledgement() -> None:
    """They had waited 40 ms on every connection that was used again: Nagle's algorithm beside delayed
    acknowledgements.
    """
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
