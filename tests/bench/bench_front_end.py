"""What a front end spends on a token, without a server: from the engine's message to a response that is handed over, on
the front end's own threads. Prints a JSON line.

    python -m tests.bench.bench_front_end --streams 256 --tokens 200

The engine's messages, with a token for each stream, are decoded, split, detokenised (the embedded model's tokenizer),
put in line and made into responses of plain Python objects: the server's library, and its round trips, are not in it
(bench_edge and bench_sends measure those). cpu_us: processor time of all threads for a token; total_loops: the same in
turns of a Python loop (yardstick.py). parts, of cpu_us: `messages`, to read them and split them by requests; `text`, to
detokenise, count and collect what is to be sent; `line`, to put that in line and wake the senders; `send`, all that the
senders do. responses: of so many tokens each was a response; while senders fall behind they join some.
"""

from __future__ import annotations

import argparse
import sys
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
from tests.bench.paced_engine import likely_tokens
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


class Responses:
    """Stands for the server's senders, of all requests."""

    def __init__(self) -> None:
        self.flags: list[int] = []  # of each response

    def send(self, response: Any, flags: int) -> None:
        self.flags.append(flags)


def begin_streams(services: Services, responses: Responses, num_streams: int, sampling: SamplingParams) -> None:
    """Asks for as many answers, whose text is all that is wanted."""
    from paged_backend.frontend import triton_io

    # earlier commits had another name for it, or made every tensor anew
    kind = getattr(triton_io, "ThreadsTensors", getattr(triton_io, "ResponseTensors", None))
    cache = [] if kind is None else [kind(triton_io.pb_utils.Tensor)]
    for _ in range(num_streams):
        request = Request(
            text="Once there was a lamp", input_ids=None, sampling=sampling, outputs=Outputs(), stream=True,
            prepend_prompt=False, arrival=time.monotonic(),
        )  # fmt: skip
        send = triton_io._send_to(responses, request.outputs, lambda token: b"", *cache)
        Answer(services, request, send, lambda: False, lambda answer: None).begin()
    getattr(triton_io, "spare_collector", lambda: None)()  # earlier commits had none


def messages_of(num_streams: int, num_tokens: int) -> list[bytes]:
    """The engine's, step after step."""
    ids = np.arange(1, num_streams + 1, dtype=np.int64)
    tokens = likely_tokens(np.random.default_rng(0), num_tokens * num_streams).reshape(num_tokens, num_streams)
    last = tuple(Finish(int(number), "length") for number in ids)
    return [
        encode(Tokens(ids.tobytes(), tokens[step].tobytes(), finishes=last if step == num_tokens - 1 else ()))
        for step in range(num_tokens)
    ]


def hear(message: bytes, engine: Engine, streamer: Streamer) -> list[float]:
    """What the front end's receiving thread does for a message. Returns the thread's processor time before it, and
    after each of its parts.
    """
    moments = [time.thread_time()]
    heard = decode_from_engine(message)
    assert isinstance(heard, Tokens)
    pieces = pieces_of(heard)
    moments.append(time.thread_time())
    with getattr(streamer, "together", nullcontext)():  # earlier commits had none
        engine.live.hand_out(pieces)
        moments.append(time.thread_time())
    return [*moments, time.thread_time()]


def measure(num_streams: int, num_tokens: int) -> dict[str, object]:
    sys.modules["triton_python_backend_utils"] = server_library()
    config, engine = EngineConfig.parse({}), Engine()
    ready = Ready(str(demo_model_folder() / "tokenizer.json"), 4096, 2048, 2**20, 16, 2**16)
    tally, streamer, responses = Tally(config, [ready]), Streamer(0.05), Responses()
    services = Services(config, engine, PromptReader(config, ready), tally, streamer)  # type: ignore[arg-type]
    begin_streams(services, responses, num_streams, SamplingParams(max_tokens=num_tokens, temperature=0.0))
    spent = np.zeros(3)  # seconds: messages, text, line
    messages = messages_of(num_streams, num_tokens)
    started, cpu = time.perf_counter(), time.process_time()
    for message in messages:
        spent += np.diff(hear(message, engine, streamer))
        time.sleep(0.002)  # senders get on meanwhile, as between two steps
    streamer.wait_until_all_ended(60)
    whole, seconds = time.process_time() - cpu, time.perf_counter() - started
    streamer.close()
    services.prompts.close()
    a_token = 1e6 / num_streams / num_tokens
    parts = zip(("messages", "text", "line", "send"), [*spent, whole - spent.sum()], strict=True)
    return {
        "bench": "front_end",
        "streams": num_streams,
        "tokens": num_tokens,
        "cpu_us": round(whole * a_token, 3),
        "total_loops": round(whole * a_token * python_loops(), 1),
        "parts": {part: round(float(seconds_of) * a_token, 3) for part, seconds_of in parts},
        "responses": round(len(responses.flags) / num_streams / num_tokens, 3),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    print_row(measure(args.streams, args.tokens))


if __name__ == "__main__":
    main()
