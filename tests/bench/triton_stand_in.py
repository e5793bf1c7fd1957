"""A stand-in for a Triton Server with the model, for benchmarks of what is before it: its gRPC service, which answers
as fast as Python's grpc can write.

`python -m tests.bench.triton_stand_in --pieces N`: prints the port. Every streamed request is answered by N pieces of
one token, made once, and a final one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
SLOW = "slowly"  # a prompt that has it: its pieces come one after another for longer than anybody waits
REFUSED = "refuse this"  # one that has it is refused
_SLOW_SECONDS = 0.2  # a piece
_REFUSAL = "INVALID_ARGUMENT: temperature: 9 is not between 0 and 2"
_DESCRIPTION = {
    "max_model_len": 4096,
    "vocab_size": 300,
    "special_words": [],
    "chat_templates": {"default": "{{ messages }}"},
    "adapters": [],
}


def response(text: str, token_ids: list[int], finish: str, final: bool) -> bytes:
    """A ModelStreamInferResponse as the real server writes it."""
    inner = pb.ModelInferResponse(model_name="paged_llm", model_version="1")
    strings = {"text_output": text, "finish_reason": finish}
    numbers = {
        "num_input_tokens": ("UINT32", [12]),
        "output_ids": ("INT32", token_ids),
        "num_cached_tokens": ("UINT32", [0]),
    }
    for name, value in strings.items():
        inner.outputs.add(name=name, datatype="BYTES", shape=[1])
        encoded = value.encode()
        inner.raw_output_contents.append(len(encoded).to_bytes(4, "little") + encoded)
    for name, (kind, values) in numbers.items():
        inner.outputs.add(name=name, datatype=kind, shape=[len(values)])
        inner.raw_output_contents.append(np.array(values, np.int32).tobytes())
    inner.parameters["triton_final_response"].bool_param = final
    return bytes(pb.ModelStreamInferResponse(infer_response=inner).SerializeToString())


def _text_of(request: Any, *names: str) -> str:
    """The first of those tensors, or ""."""
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name in names:
            return bytes(raw[4:]).decode()
    return ""


def _streams(request: Any) -> bool:
    return any(
        tensor.name == "stream" and raw == b"\x01"
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    )


class StandIn(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The two calls that the gateway needs."""

    def __init__(self, num_pieces: int) -> None:
        self._num_pieces = num_pieces
        self._piece = response(" word", [7], "None", False)
        self._last = response(" end", [8], "stop", True)
        self._tasks = {"describe": response(json.dumps(_DESCRIPTION), [], "stop", True)}
        self._refusal = pb.ModelStreamInferResponse(error_message=_REFUSAL).SerializeToString()

    def service(self, details: Any) -> Any:
        if details.method == f"/{SERVICE}/ModelReady":
            answer = pb.ModelReadyResponse(ready=True).SerializeToString()

            async def ready(request: bytes, context: Any) -> bytes:
                return bytes(answer)

            return grpc.unary_unary_rpc_method_handler(ready)
        if details.method == f"/{SERVICE}/ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(
                self._infer, request_deserializer=pb.ModelInferRequest.FromString
            )
        return None

    async def _infer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            prompt = _text_of(request, "text_input", "messages")
            if task := _text_of(request, "task"):
                yield self._tasks.get(task, self._last)
            elif REFUSED in prompt:
                yield self._refusal
            else:
                for _ in range(self._num_pieces - 1 if _streams(request) else 0):
                    yield self._piece
                while SLOW in prompt:
                    await asyncio.sleep(_SLOW_SECONDS)
                    yield self._piece
                yield self._last


async def serve(num_pieces: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((StandIn(num_pieces),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pieces", type=int, default=100)
    asyncio.run(serve(parser.parse_args().pieces))
