"""The server to measure: whether it answers, what its model takes, and whether it takes the workload."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from paged_backend.errors import EngineError
from paged_client.bench.workload import Request, Workload, as_text, make_requests, sampling_parameters

if TYPE_CHECKING:
    from tritonclient import grpc

_CONNECT_SECONDS = 5.0
_FIRST_RESPONSE_SECONDS = 300.0
_METRICS_PORT = 8002
_NEEDED = ("text_input", "stream", "sampling_parameters")
_CALIBRATION_WORDS = 200
_PROBE_ROUND = 2**31 + 1  # of prompts that no measured run sends


@dataclass(frozen=True)
class Target:
    """A model on a server. The capabilities are read from its metadata."""

    name: str  # in reports
    url: str  # of gRPC: host:port
    model_name: str
    metrics_url: str | None
    takes_ids: bool  # input_ids: prompts of exact lengths
    counts_tokens: bool  # num_output_tokens
    counts_prompts: bool  # num_input_tokens


def find_target(
    name: str, url: str, model_name: str, *, url_option: str, model_option: str, metrics_url: str | None = None
) -> Target:
    """Asks the server for its model.

    Raises:
        EngineError: nobody answers, there is no such model, or it has other tensors than the ones needed.
    """
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    address = split_url(url_option, url)
    try:
        with grpc.InferenceServerClient(address) as client:
            client.is_server_live(client_timeout=_CONNECT_SECONDS)
            if not client.is_model_ready(model_name, client_timeout=_CONNECT_SECONDS):
                served = sorted(
                    model.name
                    for model in client.get_model_repository_index(client_timeout=_CONNECT_SECONDS).models
                    if model.state == "READY"
                )
                raise EngineError(
                    f"{model_option} {model_name}: not served at {address}; ready there: "
                    f"{', '.join(served) or 'no model'}"
                )
            metadata = client.get_model_metadata(model_name, client_timeout=_CONNECT_SECONDS)
    except InferenceServerException as error:
        raise EngineError(
            f"{url_option} {url}: no Triton Server answers there over gRPC ({_first_line(error)})"
        ) from None
    inputs, outputs = {tensor.name for tensor in metadata.inputs}, {tensor.name for tensor in metadata.outputs}
    missing = [tensor for tensor in _NEEDED if tensor not in inputs] + ["text_output"] * ("text_output" not in outputs)
    if missing:
        raise EngineError(
            f"{model_option} {model_name}: the model has no tensor {', '.join(missing)}; expected those of "
            "NVIDIA's vLLM backend"
        )
    return Target(
        name=name,
        url=address,
        model_name=model_name,
        metrics_url=metrics_url,
        takes_ids="input_ids" in inputs,
        counts_tokens={"return_num_output_tokens"} <= inputs and "num_output_tokens" in outputs,
        counts_prompts={"return_num_input_tokens"} <= inputs and "num_input_tokens" in outputs,
    )


def split_url(option: str, url: str) -> str:
    """host:port of a gRPC URL, with or without a scheme.

    Raises:
        EngineError: it is something else.
    """
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.path not in ("", "/"):
        raise EngineError(f"{option} {url}: expected the host and port of gRPC, such as localhost:8001")
    return f"{host}:{port}"


def usual_metrics_url(url: str) -> str:
    """Where the metrics of the server at host:port are unless it was told otherwise."""
    return f"http://{url.rpartition(':')[0]}:{_METRICS_PORT}/metrics"


def tokens_per_word(target: Target) -> float:
    """How many tokens the model makes of a word of ours; 1 if it does not tell."""
    if not target.counts_prompts:
        return 1.0
    words = np.arange(_CALIBRATION_WORDS)
    result = _first_response(
        target,
        {"text_input": as_text(words, 1.0), "return_num_input_tokens": True},
        '{"max_tokens": 1, "ignore_eos": true}',
    )
    counted = result.as_numpy("num_input_tokens")
    return 1.0 if counted is None or not counted.size else float(counted.ravel()[0]) / _CALIBRATION_WORDS


def check_workload(target: Target, workload: Workload, *, as_ids: bool, per_word: float) -> None:
    """Sends the longest request that the workload can hold and leaves when the first tokens come.

    Raises:
        EngineError: the server refuses it, with its reason.
    """
    prompt, answer = workload.longest_request
    longest = Request(np.resize(make_requests(workload, 1, _PROBE_ROUND)[0].prompt, prompt), answer)
    tensors = {"input_ids": longest.prompt} if as_ids else {"text_input": as_text(longest.prompt, per_word)}
    try:
        _first_response(target, tensors, sampling_parameters(workload, answer))
    except EngineError as error:
        raise EngineError(
            f"the longest request of this workload ({prompt} tokens in, {answer} out) fails: {error}"
        ) from None


def _first_response(target: Target, tensors: dict[str, Any], sampling: str) -> grpc.InferResult:
    """The first response to one streamed request, which is then cancelled."""
    from tritonclient import grpc

    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(target.url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        inputs = [
            _tensor(name, value) for name, value in {**tensors, "stream": True, "sampling_parameters": sampling}.items()
        ]
        client.async_stream_infer(target.model_name, inputs)
        try:
            answer = answers.get(timeout=_FIRST_RESPONSE_SECONDS)
        except queue.Empty:
            raise EngineError(f"no answer within {_FIRST_RESPONSE_SECONDS:.0f} s") from None
        finally:
            client.stop_stream(cancel_requests=True)
    if isinstance(answer, Exception):
        raise EngineError(_first_line(answer))
    return answer


def _tensor(name: str, value: Any) -> grpc.InferInput:
    from tritonclient import grpc

    if isinstance(value, str):
        array, datatype = np.array([value.encode()], object), "BYTES"
    elif isinstance(value, bool):
        array, datatype = np.array([value]), "BOOL"
    else:
        array, datatype = np.asarray(value, np.int32), "INT32"
    made = grpc.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def _first_line(error: Exception) -> str:
    message = error.message() if hasattr(error, "message") else str(error)
    return (str(message).strip().splitlines() or [type(error).__name__])[0]
