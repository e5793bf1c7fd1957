"""What a front end spends on a token, without a server: from the engine's message to a response that is handed over, on
the front end's own threads. Prints a JSON line.

    python -m tests.bench.bench_front_end --streams 256 --tokens 200

The engine's messages, with a token for each stream, are decoded, split, detokenised (the embedded model's tokenizer),
put in line and made into responses of plain Python objects: the server's library, and its round trips, are not in it
(bench_sends measures those). cpu_us: processor time of all threads for a token; total_loops: the same in turns of a
Python loop (yardstick.py). responses: of so many tokens each was a response; while senders fall behind they join some.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import types
from contextlib import nullcontext
from typing import Any

import numpy as np

from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine_client.live_requests import LiveRequests, pieces_of
from paged_backend.frontend.answer import Answer, Services
from paged_backend.frontend.metrics import Tally
from paged_backend.frontend.prompt import PromptReader
from paged_backend.frontend.streamer import Streamer
from paged_backend.messages import Finish, Prompt, Ready, Submit, Tokens, decode_from_engine, encode
from paged_backend.request import Outputs, Request, SamplingParams
from tests.bench.yardstick import print_row, python_loops


class Engine:
    """An engine's client that only keeps who asked."""

    def __init__(self) -> None:
        self.live = LiveRequests(4096)
        self._number = 0

    def submit(self, prompt: Prompt, cache_salt: str, arrival: float, receive: Any, *more: Any, **named: Any) -> int:
        self._number += 1
        asked = Submit(self._number, prompt.token_ids.tobytes(), prompt.sampling, (), cache_salt, arrival)
        self.live.submit(asked, receive)
        return self._number

    def abort(self, request_id: int) -> None:
        self.live.abort(request_id)


def server_library() -> types.ModuleType:
    """Stands for the library that the server's stub has."""
    library: Any = types.ModuleType("triton_python_backend_utils")
    library.Tensor = lambda name, values: (name, values)
    library.InferenceResponse = tuple
    library.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module: types.ModuleType = library
    return module


def measure(num_streams: int, num_tokens: int, outputs: Outputs) -> dict[str, object]:
    sys.modules["triton_python_backend_utils"] = server_library()
    from paged_backend.frontend import triton_io

    config, engine = EngineConfig.parse({}), Engine()
    ready = Ready(str(demo_model_folder() / "tokenizer.json"), 4096, 2048, 2**20, 16, 2**16)
    tally, streamer = Tally(config, [ready]), Streamer(0.05)
    services = Services(config, engine, PromptReader(config, ready), tally, streamer)  # type: ignore[arg-type]
    responses, ended, lock = [0], [0], threading.Lock()

    class Sender:
        def send(self, response: Any, flags: int) -> None:
            with lock:
                responses[0] += 1
                ended[0] += flags

    # earlier commits made every tensor anew
    cache = [triton_io.ResponseTensors(triton_io.pb_utils.Tensor)] if hasattr(triton_io, "ResponseTensors") else []
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    for _ in range(num_streams):
        request = Request(
            text="Once there was a lamp", input_ids=None, sampling=sampling, outputs=outputs, stream=True,
            prepend_prompt=False, arrival=time.monotonic(),
        )  # fmt: skip
        send = triton_io._send_to(Sender(), outputs, lambda token: b"", *cache)
        Answer(services, request, send, lambda: False, lambda answer: None).begin()
    getattr(triton_io, "spare_collector", lambda: None)()  # earlier commits had none
    ids = np.arange(1, num_streams + 1, dtype=np.int64)
    tokens = np.random.default_rng(0).integers(300, 4000, (num_tokens, num_streams), dtype=np.int32)
    last = tuple(Finish(int(number), "length") for number in ids)
    messages = [
        encode(Tokens(ids.tobytes(), tokens[step].tobytes(), finishes=last if step == num_tokens - 1 else ()))
        for step in range(num_tokens)
    ]
    started, cpu = time.perf_counter(), time.process_time()
    for message in messages:
        heard = decode_from_engine(message)
        assert isinstance(heard, Tokens)
        with getattr(streamer, "together", nullcontext)():  # earlier commits had none
            engine.live.hand_out(pieces_of(heard))
        time.sleep(0.002)  # senders get on meanwhile, as between two steps
    while ended[0] < num_streams:
        time.sleep(0.001)
    cpu_us = (time.process_time() - cpu) / num_streams / num_tokens * 1e6
    seconds = time.perf_counter() - started
    streamer.close()
    services.prompts.close()
    return {
        "bench": "front_end",
        "streams": num_streams,
        "tokens": num_tokens,
        "cpu_us": round(cpu_us, 3),
        "total_loops": round(cpu_us * python_loops(), 1),
        "responses": round(responses[0] / num_streams / num_tokens, 3),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    print_row(measure(args.streams, args.tokens, Outputs()))


if __name__ == "__main__":
    main()
