"""How long it takes until things are well again, through a real tritonserver: a JSON line each for cancel-to-free,
refusals, drain and restart.

    python -m tests.bench.bench_reliability [--only restart,drain,refusal,cancel] [--streams 16] [--kills 20] [--model
    FOLDER] [--set KEY=VALUE …]

On a GPU, for a large geometry without its weights: `--model FOLDER_WITH_CONFIG --set load_format=dummy --set
dtype=bfloat16 --kills 10 --only restart`.

* restart: SIGKILL to the engine while `--streams` answers run; for every stream the time from the kill to its next
  token. `lost`: answers that were cut off or an error; `differ`: those with other tokens than without a kill, which in
  bfloat16 and with random weights every other batch brings about, too (`differ_without_a_kill`). `engine_seconds` is
  how long the front end says that there was no engine. Kills are `--apart` seconds apart: the next process stands by
  again then. `--set standby_engine=false` measures what it saves. What the engines said of their starts goes to stderr.
* drain: SIGTERM while `--streams` answers of `--tokens` tokens run, all of which must come whole; from the signal to
  the exit, and the same with nothing to do.
* refusal: requests at ten times the rate that the server sustains, with a queue of `--streams`; how long the refusals
  take, and how the latency of a token of those that are admitted compares with that at the sustained rate. Callers and
  server share the machine, so `probe_ms` is measured before: refusals one at a time, with the queue full.
* cancel: from a caller's cancel to the first token of the request that waited for the place (bench_cancel.py, which
    measures it under many streams).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.server.launch import Server, ServerSettings
from tests.bench import bench_cancel
from tests.server.calls import MODEL, engine_pid, tensor

_PROMPT_LEN = 32
_WAIT_SECONDS = 600.0
_OVERLOAD = 10
_PROBES = 100
_LET_IN_SECONDS = 1.0  # far more than a refusal takes
# lines of the log that say what takes how long
_STEPS_OF_A_START = r"weights:|captured in|warmed up|engine ready|engine is back"
_AGAIN_SECONDS = 0.1  # until those who keep the queue full and were refused ask again: short beside an answer
_LONG_TOKENS = 450  # of the answers that keep the queue full


@dataclass
class Told:
    """What one caller heard, and when: seconds, time.perf_counter()."""

    asked: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    ended: float = 0.0

    def pause(self, killed: float) -> float:
        """Seconds, of the longest silence that ended after `killed`, as far as it was after it: some tokens may still
        have been on their way then.
        """
        return max(later - max(earlier, killed) for earlier, later in pairwise(self.times) if later > killed)

    @property
    def token_ms(self) -> float:
        """Of a token after the first."""
        return 1000 * (self.times[-1] - self.times[0]) / max(1, len(self.token_ids) - 1)


async def ask(client: grpc.InferenceServerClient, number: int, max_tokens: int) -> Told:
    """One greedy answer, read until the server ends the stream."""
    told = Told(time.perf_counter())
    prompt = [5 + (number * 31 + position * 7) % 200 for position in range(_PROMPT_LEN)]
    given = {
        "input_ids": prompt,
        "max_tokens": max_tokens,
        "sampling_parameters": {"temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    inputs = [
        tensor(name, value)
        for name, value in {**given, "return_output_ids": True, "exclude_input_in_output": True}.items()
    ]

    async def requests() -> Any:
        yield {"model_name": MODEL, "inputs": inputs, "enable_empty_final_response": True}

    try:
        async for result, error in client.stream_infer(requests()):
            told.ended = time.perf_counter()
            if error is not None:
                told.error = error.message()
                continue
            ids = result.as_numpy("output_ids")
            if ids is not None and len(ids):
                told.token_ids += ids.tolist()
                told.times.append(told.ended)
    except InferenceServerException as error:
        told.error = error.message() or "the connection broke"
    return told


def shares(name: str, values: list[float], digits: int = 3) -> dict[str, float]:
    if not values:
        return {}
    return {
        f"{name}_p50": round(float(np.median(values)), digits),
        f"{name}_p99": round(float(np.percentile(values, 99)), digits),
    }


async def restart(server: Server, streams: int, tokens: int, kills: int, apart: float) -> dict[str, Any]:
    async with grpc.InferenceServerClient(server.addresses.grpc_url) as client:
        right, again = [
            [
                told.token_ids
                for told in await asyncio.gather(*(ask(client, number, tokens) for number in range(streams)))
            ]
            for _ in range(2)
        ]
        pauses: list[float] = []
        lost = differ = 0
        for _ in range(kills):
            await asyncio.sleep(apart)
            asked = [asyncio.create_task(ask(client, number, tokens)) for number in range(streams)]
            await asyncio.sleep(0.5)
            pid = engine_pid(server.shm_prefix)
            assert pid is not None
            killed = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            for told, ids in zip(await asyncio.wait_for(asyncio.gather(*asked), _WAIT_SECONDS), right, strict=True):
                lost += bool(told.error) or len(told.token_ids) != len(ids)
                differ += told.token_ids != ids
                if told.times and told.times[0] < killed < told.times[-1]:
                    pauses.append(told.pause(killed))
    print(*(line for line in server.log_lines() if re.search(_STEPS_OF_A_START, line)), sep="\n", file=sys.stderr)
    lines = [re.search(r"the engine is back after ([\d.]+) s", line) for line in server.log_lines()]
    engine = [float(found[1]) for found in lines if found]
    row = {
        "bench": "reliability_restart",
        "kills": kills,
        "streams_that_paused": len(pauses),
        "lost": lost,
        "differ": differ,
    }
    row |= {
        "answers": kills * streams,
        "differ_without_a_kill": sum(one != other for one, other in zip(right, again, strict=True)),
    }
    return (
        row
        | shares("pause_seconds", pauses)
        | {"pause_seconds_max": round(max(pauses), 3)}
        | shares("engine_seconds", engine or [0.0])
    )


async def answers(address: str, streams: int, tokens: int, begun: asyncio.Event) -> list[Told]:
    async with grpc.InferenceServerClient(address) as client:
        asked = [asyncio.create_task(ask(client, number, tokens)) for number in range(streams)]
        await asyncio.sleep(0.5)
        begun.set()
        return await asyncio.wait_for(asyncio.gather(*asked), _WAIT_SECONDS)


async def drain(server: Server, streams: int, tokens: int) -> tuple[list[Told], float]:
    begun = asyncio.Event()
    listening = asyncio.create_task(answers(server.addresses.grpc_url, streams, tokens, begun))
    await begun.wait()
    started = time.perf_counter()
    server.terminate()
    told = await listening
    return told, started


async def probe(client: grpc.InferenceServerClient, streams: int) -> list[float]:
    """Milliseconds of refusals with the queue full, one at a time, so that nothing but the way there and back is
    measured.
    """
    found: list[float] = []

    async def keep_full(number: int) -> None:
        while len(found) < _PROBES:
            if (await ask(client, number, _LONG_TOKENS)).error:
                await asyncio.sleep(_AGAIN_SECONDS)

    full = [asyncio.create_task(keep_full(number)) for number in range(2 * streams + 2)]
    while len(found) < _PROBES:
        await asyncio.sleep(0.05)
        try:
            told = await asyncio.wait_for(ask(client, 0, 1), _LET_IN_SECONDS)
        except (
            asyncio.TimeoutError
        ):  # it got the place of one that has just begun: a caller who keeps the queue full is to have it
            await asyncio.sleep(3 * _AGAIN_SECONDS)
            continue
        if "max_queue_size" in told.error:
            found.append(1000 * (told.ended - told.asked))
    await asyncio.wait_for(asyncio.gather(*full), _WAIT_SECONDS)
    return found


async def refusal(server: Server, streams: int, tokens: int, seconds: float) -> dict[str, Any]:
    async with grpc.InferenceServerClient(server.addresses.grpc_url) as client:
        calm: list[Told] = []
        until = time.perf_counter() + seconds

        async def again(number: int) -> None:
            while time.perf_counter() < until:
                calm.append(await ask(client, number, tokens))

        started = time.perf_counter()
        await asyncio.gather(*(again(number) for number in range(streams)))
        rate = len(calm) / (time.perf_counter() - started)
        probes = await probe(client, streams)
        asked = []
        until = time.perf_counter() + seconds
        due = time.perf_counter()
        while due < until:
            asked.append(asyncio.create_task(ask(client, len(asked), tokens)))
            due += 1 / (_OVERLOAD * rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        told = await asyncio.wait_for(asyncio.gather(*asked), _WAIT_SECONDS)
    refused = [1000 * (one.ended - one.asked) for one in told if "max_queue_size" in one.error]
    admitted = [one for one in told if not one.error]
    row: dict[str, Any] = {
        "bench": "reliability_refusal",
        "sustained_per_second": round(rate, 1),
        "asked": len(told),
        "refused": len(refused),
    }
    row |= {"other_errors": len(told) - len(refused) - len(admitted)} | shares("refusal_ms", refused, 1)
    row |= {"probes": len(probes)} | shares("probe_ms", probes, 1)
    row |= shares("calm_token_ms", [one.token_ms for one in calm], 1) | shares(
        "admitted_token_ms", [one.token_ms for one in admitted], 1
    )
    return row | shares("admitted_wait_seconds", [one.times[0] - one.asked for one in admitted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="restart,drain,refusal,cancel")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--apart", type=float, default=30, help="seconds between the end of one kill's answers and the next kill"
    )
    parser.add_argument("--seconds", type=float, default=15, help="of each rate, for refusals")
    parser.add_argument("--cancels", type=int, default=50)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--instances", type=int, default=None, help="front ends; default: what paged serve takes")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the model"
    )
    args = parser.parse_args()
    given = dict(option.split("=", 1) for option in args.options)

    def serve(**options: Any) -> Server:
        defaults = {
            "max_model_len": "512",
            "max_engine_restarts": "100000",
            "max_num_sequences": str(args.streams),
            **options,
        }
        return Server(ServerSettings(model=args.model, instances=args.instances, options={**defaults, **given}))

    for what in args.only.split(","):
        if what == "restart":
            with serve() as server:
                row = asyncio.run(restart(server, args.streams, args.tokens, args.kills, args.apart))
        elif what == "drain":
            row = {"bench": "reliability_drain", "streams": args.streams}
            for name, streams in (("idle_seconds", 0), ("drain_seconds", args.streams)):
                server = serve()
                server.start()
                told, started = asyncio.run(drain(server, streams, args.tokens))
                code = server.stop()
                row |= {
                    name: round(time.perf_counter() - started, 2),
                    "exit_code": code,
                    "cut_off": sum(bool(one.error) for one in told),
                }
                if told:
                    row["after_last_answer_seconds"] = round(time.perf_counter() - max(one.ended for one in told), 2)
        elif what == "refusal":
            with serve(max_queue_size=args.streams) as server:
                row = asyncio.run(refusal(server, args.streams, args.tokens // 4, args.seconds))
        else:
            with serve(max_num_sequences=str(bench_cancel.OWN_STREAMS), max_model_len="2048") as server:
                delays, plain = asyncio.run(bench_cancel.measure(server.addresses.grpc_url, args.cancels, 2000))
            row = {"bench": "reliability_cancel", "cancels": len(delays)} | shares("cancel_to_free_ms", delays, 1)
            row |= {"plain_first_token_ms_p50": round(float(np.median(plain)), 1)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
