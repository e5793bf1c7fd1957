"""Many streams for a long time through a real tritonserver: every answer right and ended once, memory flat. Prints JSON
lines.

    python -m tests.bench.bench_streams --streams 1000 --seconds 600 [--transport grpc|http] [--instances 2] [--set
    KEY=VALUE]

Each stream asks again as soon as it is answered: one of a few prompts, an answer of random length. The right answers
are asked for one at a time before the clock starts (greedy decoding: a shorter answer begins like a longer one). An
answer counts as wrong if a token is missing, foreign or out of order, or if its text is not that of its tokens; every
stream must end in exactly one final response. Memory is the resident set of the server with its stubs and the engine,
and what it holds in /dev/shm, sampled every few seconds; the change is from the median of the second fifth of the run
(the first is warm-up) to the last's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as grpc

from paged_backend.server.launch import Server, ServerSettings
from tests.bench.yardstick import print_row
from tests.server.calls import run_all, stream

_PROMPTS = tuple(
    f"{opening} {name} was a {trade}."
    for opening in ("Once upon a time", "Long ago")
    for name in ("Mira", "Tom")
    for trade in ("baker", "sailor")
)
_SAMPLE_SECONDS = 2.0
_GREEDY = {"temperature": 0, "ignore_eos": True}


class Memory:
    """Bytes of a process, of all its descendants, and of its files in /dev/shm."""

    def __init__(self, pid: int, shm_prefix: str, without: bytes | None = None) -> None:
        """without: leave out descendants whose command has this in it."""
        self._pid, self._shm_prefix, self._without = pid, shm_prefix, without
        self.resident: list[int] = []
        self.shared: list[int] = []

    def sample(self) -> None:
        self.resident.append(
            sum(
                _resident(pid)
                for pid in family(self._pid)
                if self._without is None or self._without not in _command(pid)
            )
        )
        self.shared.append(sum(path.stat().st_blocks * 512 for path in Path("/dev/shm").glob(f"{self._shm_prefix}*")))

    def change(self, samples: list[int]) -> dict[str, float]:
        """Median of the second fifth and of the last, in MiB, and their ratio less 1."""
        fifth = max(1, len(samples) // 5)
        early, late = statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])
        return {
            "early_mib": round(early / 2**20, 1),
            "late_mib": round(late / 2**20, 1),
            "growth": round(late / early - 1, 4) if early else 0.0,
        }


def family(pid: int) -> list[int]:
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            children |= {int(child) for child in path.read_text().split()}
    return [pid, *(member for child in children for member in family(child))]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


class Tallies:
    def __init__(self) -> None:
        self.counts = {"answers": 0, "tokens": 0, "responses": 0, "wrong": 0, "errors": 0, "not_one_final": 0}
        self.first_fault = ""

    def fault(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.first_fault = self.first_fault or f"{kind}: {what}"[:300]


async def ask_grpc(
    address: str, truth: list[dict[str, Any]], until: float, chance: random.Random, tallies: Tallies, streams: int
) -> None:
    async def one(client: grpc.InferenceServerClient) -> None:
        while time.monotonic() < until:
            known, length = chance.choice(truth), chance.randint(1, 40)
            answer = await stream(client, text_input=known["prompt"], max_tokens=length, sampling_parameters=_GREEDY)
            tallies.counts["answers"] += 1
            tallies.counts["tokens"] += len(answer.token_ids)
            tallies.counts["responses"] += len(answer.text)
            if answer.error is not None:
                tallies.fault("errors", answer.message)
            elif answer.num_finals != 1:
                tallies.fault("not_one_final", f"{answer.num_finals} finals")
            elif answer.token_ids != known["ids"][:length] or not known["text"].startswith("".join(answer.text)):
                tallies.fault(
                    "wrong", f"{answer.token_ids} instead of {known['ids'][:length]}, text {''.join(answer.text)!r}"
                )

    async with grpc.InferenceServerClient(address) as client:
        await asyncio.gather(*(one(client) for _ in range(streams)))


async def ask_http(
    address: str, truth: list[dict[str, Any]], until: float, chance: random.Random, tallies: Tallies, streams: int
) -> None:
    """By hand over sockets, so that a thousand streams need no more than asyncio; server-sent events end with the
    connection or the final chunk.
    """
    host, port = address.split(":")

    async def one() -> None:
        while time.monotonic() < until:
            known, length = chance.choice(truth), chance.randint(1, 40)
            fields = {
                "text_input": known["prompt"],
                "max_tokens": length,
                "stream": True,
                "return_output_ids": True,
                "return_finish_reason": True,
            }
            body = json.dumps({**fields, "sampling_parameters": json.dumps(_GREEDY)}).encode()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = (
                f"POST /v2/models/paged_llm/generate_stream HTTP/1.1\r\nHost: {host}\r\nConnection: "
                f"close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            raw = await reader.read()
            writer.close()
            events = [json.loads(line[6:]) for line in raw.decode().split("\n") if line.startswith("data: ")]
            ids = [token for event in events for token in _as_list(event.get("output_ids", []))]
            finals = sum(event.get("finish_reason") in ("length", "stop") for event in events)
            tallies.counts["answers"] += 1
            tallies.counts["tokens"] += len(ids)
            tallies.counts["responses"] += len(events)
            if any("error" in event for event in events) or not events:
                tallies.fault("errors", raw.decode()[-200:])
            elif finals != 1:
                tallies.fault("not_one_final", f"{finals} finals")
            elif ids != known["ids"][:length] or not known["text"].startswith(
                "".join(event["text_output"] for event in events)
            ):
                tallies.fault("wrong", f"{ids} instead of {known['ids'][:length]}")

    await asyncio.gather(*(one() for _ in range(streams)))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def client_main() -> None:
    """One of the client processes: its orders as JSON on stdin, its counts as JSON on stdout."""
    orders = json.loads(sys.stdin.read())
    tallies = Tallies()
    ask = ask_grpc if orders["transport"] == "grpc" else ask_http
    until = time.monotonic() + orders["seconds"]
    asyncio.run(
        ask(orders["address"], orders["truth"], until, random.Random(orders["seed"]), tallies, orders["streams"])
    )
    print(json.dumps({**tallies.counts, "first_fault": tallies.first_fault}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--transport", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--processes", type=int, default=4, help="client processes that share the streams")
    parser.add_argument("--instances", type=int, default=None, help="front ends; default: what paged serve takes")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the model"
    )
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client_main()
        return
    options = {
        "dtype": "float32",
        "max_model_len": "256",
        "max_num_sequences": "128",
        **dict(option.split("=", 1) for option in args.options),
    }
    with Server(ServerSettings(instances=args.instances, options=options)) as server:
        truth = ask_truth(server.addresses.grpc_url)
        clients = start_clients(server, truth, args)
        memory = Memory(server.pid, server.shm_prefix)
        seconds = watch(clients, memory, args.seconds)
        counts = [json.loads(client.stdout.read() or "{}") for client in clients if client.stdout is not None]
    print_row(
        {
            "bench": "streams",
            "transport": args.transport,
            "streams": args.streams,
            "seconds": round(seconds),
            **{key: sum(count.get(key, 0) for count in counts) for key in Tallies().counts},
            "clients_lost": sum(not count for count in counts),
            "first_fault": next((count["first_fault"] for count in counts if count.get("first_fault")), ""),
            "resident": memory.change(memory.resident),
            "dev_shm": memory.change(memory.shared),
            "samples": len(memory.resident),
        }
    )


def ask_truth(grpc_url: str) -> list[dict[str, Any]]:
    """The longest answer to each prompt."""
    asked = [{"text_input": prompt, "max_tokens": 41, "sampling_parameters": _GREEDY} for prompt in _PROMPTS]
    return [
        {"prompt": prompt, "ids": answer.token_ids, "text": "".join(answer.text)}
        for prompt, answer in zip(_PROMPTS, run_all(grpc_url, asked), strict=True)
    ]


def start_clients(server: Server, truth: list[dict[str, Any]], args: argparse.Namespace) -> list[subprocess.Popen[str]]:
    """They share the streams."""
    addresses = server.addresses
    address = addresses.grpc_url if args.transport == "grpc" else addresses.http_url.removeprefix("http://")
    clients = []
    for seed in range(args.processes):
        client = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bench_streams", "--client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        orders = {
            "transport": args.transport,
            "seconds": args.seconds,
            "address": address,
            "truth": truth,
            "seed": seed,
            "streams": args.streams // args.processes + (seed < args.streams % args.processes),
        }
        assert client.stdin is not None
        client.stdin.write(json.dumps(orders))
        client.stdin.close()
        clients.append(client)
    return clients


def watch(clients: list[subprocess.Popen[str]], memory: Memory, seconds: float) -> float:
    """Samples the memory until all clients have ended, which are to run that long. Returns how long they did."""
    started = time.monotonic()
    while any(client.poll() is None for client in clients):
        memory.sample()
        time.sleep(_SAMPLE_SECONDS)
        if time.monotonic() - started > seconds + 300:
            for client in clients:
                client.kill()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
