"""Calls to a running server, as a client makes them: one gRPC stream a request, many at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import numpy as np
import tritonclient.grpc.aio as grpc
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from paged_client.top.engines import find_engines

MODEL = "paged_llm"


@dataclass
class Answer:
    """What one stream brought."""

    text: list[str] = field(default_factory=list)  # a piece a response
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    num_finals: int = 0
    num_cached_tokens: int = 0
    error: InferenceServerException | None = None

    @property
    def message(self) -> str:
        """The error's text: all that a gRPC stream carries of it."""
        return "" if self.error is None else self.error.message()


def tensor_array(name: str, value: Any) -> NDArray[Any]:
    array: NDArray[Any] = {
        "text_input": lambda: np.array([value], object),
        "sampling_parameters": lambda: np.array(
            [value if isinstance(value, (str, bytes)) else json.dumps(value)], object
        ),
        "input_ids": lambda: np.array(value, np.int32),
        "answer_ids": lambda: np.array(value, np.int32),
        "max_tokens": lambda: np.array([value], np.int32),
        "stop_words": lambda: np.array(value, object),
        "temperature": lambda: np.array([value], np.float32),
    }.get(name, lambda: np.array([value], np.bool_))()
    return array


def tensor(name: str, value: Any) -> grpc.InferInput:
    array = tensor_array(name, value)
    made = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


async def stream(
    client: grpc.InferenceServerClient,
    *,
    leave_after: float | None = None,
    leave_at_token: int | None = None,
    parameters: Any = None,
    **tensors: Any,
) -> Answer:
    """One request over a stream of its own; `leave_*` cancels it after seconds, or once that many tokens have come."""
    answer = Answer()
    wanted = {
        "stream": True,
        "return_output_ids": True,
        "return_finish_reason": True,
        "return_num_cached_tokens": True,
    } | tensors

    async def requests() -> AsyncIterator[dict[str, Any]]:
        inputs = [tensor(name, value) for name, value in wanted.items() if value is not None]
        yield {"model_name": MODEL, "inputs": inputs, "enable_empty_final_response": True, "parameters": parameters}

    # without triton_grpc_error: Triton Server 2.51.0 crashes over it now and then
    responses = client.stream_infer(requests())

    async def listen() -> None:
        async for result, error in responses:
            if error is not None:
                answer.error = error
                return
            _take(answer, result)
            if leave_at_token is not None and len(answer.token_ids) >= leave_at_token:
                responses.cancel()
                return

    try:
        await asyncio.wait_for(listen(), leave_after)
    except asyncio.TimeoutError:
        responses.cancel()
    except asyncio.CancelledError:
        responses.cancel()
        raise
    except InferenceServerException as error:
        answer.error = error
    return answer


def _take(answer: Answer, result: grpc.InferResult) -> None:
    response = result.get_response()
    final = response.parameters["triton_final_response"].bool_param
    answer.num_finals += final
    text = result.as_numpy("text_output")
    if text is None:
        return
    answer.text.append(b"".join(text).decode())
    answer.token_ids += result.as_numpy("output_ids").tolist()
    answer.finish_reasons.append(result.as_numpy("finish_reason")[0].decode())
    answer.num_cached_tokens = max(answer.num_cached_tokens, int(result.as_numpy("num_cached_tokens")[0]))


def run_all(grpc_address: str, requests: Sequence[dict[str, Any]], lead: int = 0) -> list[Answer]:
    """Sends all requests at once, the first `lead` of them half a second earlier, and gathers their answers, in
    order.
    """

    async def together() -> list[Answer]:
        async with grpc.InferenceServerClient(grpc_address) as client:
            first = [asyncio.create_task(stream(client, **request)) for request in requests[:lead]]
            if first:
                await asyncio.sleep(0.5)
            return await asyncio.gather(*first, *(stream(client, **request) for request in requests[lead:]))

    return asyncio.run(together())


def metrics(url: str) -> dict[str, float]:
    """The paged_* series of /metrics, by `name{label=value,…}` without model and version."""
    values: dict[str, float] = {}
    with urlopen(url, timeout=30) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(("paged_", "nv_trt_llm_")):
                series, value = line.rsplit(" ", 1)
                name, _, labels = series.partition("{")
                kept = [
                    label
                    for label in labels.rstrip("}").split(",")
                    if label and not label.startswith(("model=", "version="))
                ]
                key = f"{name}{{{','.join(kept)}}}" if kept else name
                values[key] = values.get(key, 0.0) + float(value)
    return values


def wait_for_metrics(url: str, holds: Callable[[dict[str, float]], bool], seconds: float = 20.0) -> bool:
    """Whether the metrics, which are published a few times a second (more seldom on a busy machine), come to satisfy a
    condition in time.
    """
    end = time.monotonic() + seconds
    while not holds(metrics(url)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def settled_metrics(url: str, seconds: float = 20.0) -> dict[str, float]:
    """The metrics, once they have stopped changing: all that was answered is in them."""
    end = time.monotonic() + seconds
    before = metrics(url)
    while True:
        time.sleep(0.8)
        after = metrics(url)
        if after == before:
            return after
        assert time.monotonic() < end, {name for name, value in after.items() if before.get(name) != value}
        before = after


def engine_pid(shm_prefix: str) -> int | None:
    """The engine's process, a grandchild of the server whose files in /dev/shm begin like that."""
    return next((engine.pid for engine in find_engines() if shm_prefix.removesuffix("-") in str(engine.folder)), None)
