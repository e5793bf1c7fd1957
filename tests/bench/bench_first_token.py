"""When a lone request's first token comes: from the engine alone, and through a Triton Server to three clients. Prints
a JSON line for each client and length of prompt.

    python -m tests.bench.bench_first_token --model llama-3.2-1b                     # the engine alone
    python -m tests.bench.bench_first_token --url localhost:8001                     # a server that runs already

One request at a time, the next one as soon as the one before has ended; prompts are token ids that nobody has sent
before, so that no prefix cache knows them. first_ms: from handing the request over to its first token; the medians of
both commands have the server and the client between them. Clients: `perf_analyzer`, which is what `paged bench` asks
with; `grpc`, Python's gRPC alone, whose request lies ready as bytes and whose responses stay bytes; `paged`, the client
library. --pause-ms leaves the machine idle before each request, as it is for a caller who comes now and then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paged_client.bench.load import Level, LoadLimits, Prompting, run_load
from paged_client.bench.perf_analyzer import find_perf_analyzer
from paged_client.bench.target import find_target
from paged_client.bench.workload import Span, Workload, make_requests
from tests.bench.geometries import GEOMETRIES, write_geometry
from tests.bench.yardstick import print_row, python_loops

if TYPE_CHECKING:
    from paged_backend.engine.engine import Engine

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_LOWEST_ID, _HIGHEST_ID = 100, 1000  # every vocabulary has them
_WARM_UP = 5  # requests that are not counted
_TIMEOUT_SECONDS = 60.0

Ask = Callable[[NDArray[np.int32]], float]
"""Sends a prompt, waits for the end of its answer; seconds from sending to the first token."""


def figures(seconds: list[float]) -> dict[str, float]:
    p50, p90 = np.percentile(np.array(seconds) * 1000, [50, 90])
    return {"p50": round(float(p50), 3), "p90": round(float(p90), 3), "least": round(min(seconds) * 1000, 3)}


def prompts(length: int, count: int) -> Iterator[NDArray[np.int32]]:
    generator = np.random.default_rng()
    for _ in range(count):
        yield generator.integers(_LOWEST_ID, _HIGHEST_ID, length).astype(np.int32)


def measured(ask: Ask, length: int, count: int, pause: float) -> list[float]:
    seconds = []
    for prompt in prompts(length, count + _WARM_UP):
        time.sleep(pause)
        seconds.append(ask(prompt))
    return seconds[_WARM_UP:]


def loaded(model: str, options: dict[str, str]) -> Engine:
    """An engine in this process; random weights of that geometry, or the embedded model."""
    from paged_backend.config import EngineConfig
    from paged_backend.engine.loading import load_engine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fixed: dict[str, Any] = {"model": model}
        if model != "demo":
            checkpoint = write_geometry(model, folder / "model")
            fixed = {"model": str(checkpoint), "load_format": "dummy", "prefix_cache": False, "max_model_len": 4096}
        return load_engine(EngineConfig.parse({**fixed, "speculation": "off", **options}), folder)[0]


def engine_alone(engine: Engine, num_tokens: int) -> Ask:
    """Asks an engine in this process."""
    from paged_backend.messages import Submit
    from paged_backend.request import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    numbers = itertools.count(10**9)  # of requests; whoever else asks this engine has others

    def ask(prompt: NDArray[np.int32]) -> float:
        first = 0.0
        started = time.perf_counter()
        engine.submit(Submit(next(numbers), prompt.tobytes(), sampling, (), "", time.monotonic()))
        while not engine.idle:
            if any(len(output.token_ids) for output in engine.step()) and not first:
                first = time.perf_counter() - started
        return first

    return ask


def plain_grpc(url: str, model: str, num_tokens: int) -> Ask:
    """Asks over Python's gRPC alone, a call for each request over one connection. One request and its end are what a
    stream of requests begins with, so the call may be one that needs no thread beside the caller's.
    """
    import grpc
    import grpc.experimental
    from tritonclient.grpc import service_pb2

    options = [(grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
    channel = grpc.insecure_channel(url, options)
    sampling = json.dumps({"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0}).encode()

    def ask(prompt: NDArray[np.int32]) -> float:
        request = service_pb2.ModelInferRequest(model_name=model)
        for name, kind, size, content in (
            ("input_ids", "INT32", len(prompt), prompt.tobytes()),
            ("stream", "BOOL", 1, b"\1"),
            ("sampling_parameters", "BYTES", 1, len(sampling).to_bytes(4, "little") + sampling),
        ):
            request.inputs.add(name=name, datatype=kind, shape=[size])
            request.raw_input_contents.append(content)
        body, infer = request.SerializeToString(), channel.unary_stream(_METHOD)
        started = time.perf_counter()
        responses = infer(body, timeout=_TIMEOUT_SECONDS)
        first_response = next(responses)
        first = time.perf_counter() - started
        error = service_pb2.ModelStreamInferResponse.FromString(first_response).error_message
        if error:
            raise SystemExit(f"the server refuses a prompt of {len(prompt)} tokens: {error}")
        for _ in responses:
            pass
        return first

    return ask


def client_library(url: str, model: str, num_tokens: int) -> Ask:
    """Asks with the client that Python programs use."""
    from paged_client.client import PagedClient

    client = PagedClient(url, model=model, timeout=_TIMEOUT_SECONDS)

    def ask(prompt: NDArray[np.int32]) -> float:
        first = 0.0
        ids = prompt.tolist()
        started = time.perf_counter()
        for _ in client.stream(ids, max_tokens=num_tokens, ignore_eos=True, temperature=0.0):
            first = first or time.perf_counter() - started
        return first

    return ask


def perf_analyzer(url: str, model: str, num_tokens: int, length: int, count: int) -> list[float]:
    """The same of `paged bench`'s tool, which knows no pause."""
    target = find_target(model, url, model, url_option="--url", model_option="--served-as")
    workload = Workload(Span(length, length), Span(num_tokens, num_tokens), nonce=time.monotonic_ns() % 2**32)
    limits = LoadLimits(1, _TIMEOUT_SECONDS + count, len(os.sched_getaffinity(0)))
    prompting = Prompting(as_ids=target.takes_ids, tokens_per_word=1.0, count_tokens=target.counts_tokens)
    requests = make_requests(workload, count + _WARM_UP)
    tool = find_perf_analyzer(lambda line: None)
    traces = run_load(tool, target, Level(1), workload, requests, prompting, limits, lambda: None)
    return [(int(trace.arrivals[0]) - trace.sent) / 1e9 for trace in traces[_WARM_UP:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", choices=["demo", *GEOMETRIES], help="of the engine alone")
    where.add_argument("--url", help="of a running server's gRPC")
    parser.add_argument("--served-as", default="paged_llm", help="what that server calls the model")
    parser.add_argument("--clients", nargs="+", default=["perf_analyzer", "grpc", "paged"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128], help="tokens")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    args = parser.parse_args()
    pause = args.pause_ms / 1000
    options = dict(option.split("=", 1) for option in args.options)
    asks = {"engine": engine_alone(loaded(args.model, options), args.tokens)} if args.model else {}
    for client, begin in (("grpc", plain_grpc), ("paged", client_library)):
        if args.url and client in args.clients:
            asks[client] = begin(args.url, args.served_as, args.tokens)
    for length in args.prompts:
        found = {client: measured(ask, length, args.requests, pause) for client, ask in asks.items()}
        if args.url and "perf_analyzer" in args.clients:
            found["perf_analyzer"] = perf_analyzer(args.url, args.served_as, args.tokens, length, args.requests)
        for client, seconds in found.items():
            row = {"bench": "first_token", "client": client, "prompt": length, "first_ms": figures(seconds)}
            row |= {"requests": len(seconds), "pause_ms": 0.0 if client == "perf_analyzer" else args.pause_ms}
            if args.model:
                print_row(row)
            else:  # the GPU is the server's
                print(json.dumps({**row, "yardstick": {"python_mloops_s": round(python_loops(), 2)}}), flush=True)


if __name__ == "__main__":
    main()
