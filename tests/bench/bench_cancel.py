"""From a client's cancel to the pages being somebody else's: milliseconds, with many streams running. Prints a JSON
line.

    python -m tests.bench.bench_cancel --streams 256 --cancels 100 [--url HOST:PORT] [--instances 4] [--set KEY=VALUE]

As many sequences run as the engine admits (max_num_sequences = --streams), all of them streams that would go on for
long, and one more request waits. One stream is cancelled; the clock runs until the waiting request's first token
reaches its client. So the figure has everything in it: the server noticing the cancel, the front end asking for it, the
abort, the admission, one step, and the way out. baseline_ms is the same way without a cancel: the time to first token
of a request while one place is free. Most streams are read by other processes, so that this one has time to look at the
clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc

from paged_backend.server.launch import Server, ServerSettings
from tests.bench.yardstick import print_row
from tests.server.calls import tensor

OWN_STREAMS = 8  # of this process, which are cancelled in turn
_PROMPT_LEN = 32


class Stream:
    """A request over a stream of its own that is read until it is cancelled."""

    def __init__(self, client: grpc.InferenceServerClient, seed: int, max_tokens: int) -> None:
        ids = np.random.default_rng(seed).integers(3, 1000, _PROMPT_LEN).tolist()
        wanted = {
            "input_ids": ids,
            "stream": True,
            "max_tokens": max_tokens,
            "sampling_parameters": {"ignore_eos": True, "temperature": 0},
        }
        inputs = [tensor(name, value) for name, value in wanted.items()]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "paged_llm", "inputs": inputs, "enable_empty_final_response": True}

        self.first = asyncio.get_running_loop().create_future()
        self._responses = client.stream_infer(requests())
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for _, error in self._responses:
                if not self.first.done():
                    if error is None:
                        self.first.set_result(time.perf_counter())
                    else:
                        self.first.set_exception(error)

    def cancel(self) -> None:
        self._responses.cancel()
        self._reader.cancel()


async def measure(address: str, cancels: int, max_tokens: int) -> tuple[list[float], list[float]]:
    """(cancel to first token, plain time to first token) in milliseconds."""
    serial = int(time.time())
    async with grpc.InferenceServerClient(address) as client:
        running = []
        for _ in range(OWN_STREAMS):
            serial += 1
            running.append(Stream(client, serial, max_tokens))
        await asyncio.gather(*(stream.first for stream in running))
        delays, plain = [], []
        for number in range(cancels):
            serial += 1
            waiting = Stream(client, serial, max_tokens)
            await asyncio.sleep(0.05 + 0.001 * (number % 37))  # it waits; the phase against the server's polling varies
            assert not waiting.first.done(), "the engine has room for one more stream: nothing is measured"
            victim = running.pop(0)
            started = time.perf_counter()
            victim.cancel()
            delays.append(1000 * (await asyncio.wait_for(waiting.first, 60) - started))
            running.append(waiting)
        for _ in range(max(10, cancels // 5)):
            running.pop(0).cancel()
            await asyncio.sleep(0.5)
            serial += 1
            started = time.perf_counter()
            fresh = Stream(client, serial, max_tokens)
            plain.append(1000 * (await asyncio.wait_for(fresh.first, 60) - started))
            running.append(fresh)
        for stream in running:
            stream.cancel()
        await asyncio.sleep(0.2)
    return delays, plain


async def hold(address: str, count: int, max_tokens: int) -> None:
    """Reads `count` streams until killed; says when all have begun."""
    async with grpc.InferenceServerClient(address) as client:
        streams = [Stream(client, 10_000_000 + number, max_tokens) for number in range(count)]
        await asyncio.gather(*(stream.first for stream in streams))
        print("running", flush=True)
        await asyncio.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=100_000, help="of each stream; cut to what the model takes")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--instances", type=int, default=None, help="front ends; default: what paged serve takes")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the model"
    )
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        asyncio.run(hold(args.address, args.hold, args.max_tokens))
        return
    options = {
        "max_num_sequences": str(args.streams),
        "max_model_len": "2048",
        **dict(option.split("=", 1) for option in args.options),
    }
    max_tokens = min(args.max_tokens, int(options["max_model_len"]) - _PROMPT_LEN)
    with Server(ServerSettings(model=args.model, instances=args.instances, options=options)) as server:
        address = server.addresses.grpc_url
        others = args.streams - OWN_STREAMS
        shares = [others // args.processes + (i < others % args.processes) for i in range(args.processes)]
        command = [
            sys.executable,
            "-m",
            "tests.bench.bench_cancel",
            "--address",
            address,
            "--max-tokens",
            str(max_tokens),
            "--hold",
        ]
        holders = [subprocess.Popen([*command, str(share)], stdout=subprocess.PIPE) for share in shares if share]
        try:
            for holder in holders:
                assert holder.stdout is not None
                assert holder.stdout.readline(), "a client process ended"
            delays, plain = asyncio.run(measure(address, args.cancels, max_tokens))
        finally:
            for holder in holders:
                holder.kill()
                holder.wait()
    row: dict[str, Any] = {"bench": "cancel", "streams": args.streams, "cancels": len(delays)}
    row |= {f"p{share}_ms": round(float(np.percentile(delays, share)), 1) for share in (50, 90, 99)}
    row |= {
        "baseline_ms": round(float(np.median(plain)), 1),
        "p99_less_baseline_ms": round(float(np.percentile(delays, 99) - np.median(plain)), 1),
    }
    print_row(row)


if __name__ == "__main__":
    main()
