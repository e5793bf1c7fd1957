"""Prefix hits and times to first token of several servers behind one gateway, by routing. Prints JSON lines.

    python -m tests.bench.bench_cluster                        # three servers of the embedded model on this machine
    python -m tests.bench.bench_cluster --trace trace.jsonl    # and writes what was asked, for tools/cluster_sim

Requests come at random times (Poisson). Each begins with one of `--heads` heads of `--head-tokens` tokens and goes on
with tokens of its own. All heads together are more than one server's pool holds, and less than all pools do. The
routings take turns, in rounds with heads of their own, so that what else the machine does meets all of them alike. Hits
are the servers' own counts of prompt tokens found in their prefix caches, as told with each answer; the first time each
head is seen counts as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from paged_backend.server.launch import Server, ServerSettings
from paged_client.cluster.cluster_client import ClusterClient

PAGE_SIZE = 16


@dataclass(frozen=True)
class Asked:
    """A request of the trace."""

    seconds: float  # after the round's beginning
    head: int
    head_tokens: int
    own_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Measured:
    prompt_tokens: int
    cached_tokens: int
    first_seconds: float
    total_seconds: float


def make_trace(options: argparse.Namespace, dice: random.Random) -> list[Asked]:
    seconds, trace = 0.0, []
    for _ in range(options.requests):
        seconds += dice.expovariate(options.rate)
        own = dice.randrange(options.own_tokens // 2, options.own_tokens * 3 // 2)
        trace.append(Asked(seconds, dice.randrange(options.heads), options.head_tokens, own, options.output_tokens))
    return trace


async def ask(client: ClusterClient, asked: Asked, prompt: Sequence[int]) -> Measured:
    await asyncio.sleep(asked.seconds)
    started = time.monotonic()
    first = 0.0
    async with client.stream(prompt, max_tokens=asked.output_tokens, temperature=0, ignore_eos=True) as stream:
        async for delta in stream:
            first = first or time.monotonic()
            usage = delta.usage
    return Measured(usage.num_input_tokens, usage.num_cached_tokens, first - started, time.monotonic() - started)


async def measure(client: ClusterClient, trace: Sequence[Asked], dice: random.Random) -> list[Measured]:
    """One round, with heads that nobody has seen."""
    num_heads = 1 + max(asked.head for asked in trace)
    heads = [[dice.randrange(10, 4000) for _ in range(trace[0].head_tokens)] for _ in range(num_heads)]
    prompts = [[*heads[asked.head], *(dice.randrange(10, 4000) for _ in range(asked.own_tokens))] for asked in trace]
    return await asyncio.gather(*(ask(client, asked, prompt) for asked, prompt in zip(trace, prompts, strict=True)))


async def step_cost(client: ClusterClient, num_servers: int, dice: random.Random) -> dict[str, float]:
    """What a step takes while every server is busy, for tools/cluster_sim: medians of first tokens of short and long
    prompts, and of the tokens after.
    """

    async def median(num_tokens: int, output_tokens: int) -> Measured:
        measured = []
        for _ in range(3):
            trace = [Asked(0.0, 0, 0, num_tokens, output_tokens) for _ in range(num_servers)]
            prompts = [[dice.randrange(10, 4000) for _ in range(num_tokens)] for _ in trace]
            measured += await asyncio.gather(
                *(ask(client, asked, prompt) for asked, prompt in zip(trace, prompts, strict=True))
            )
        return sorted(measured, key=lambda one: one.first_seconds)[len(measured) // 2]

    short, long = await median(16, 33), await median(512, 1)
    prompt_token = (long.first_seconds - short.first_seconds) / (512 - 16)
    decoding = (short.total_seconds - short.first_seconds) / 32
    return {"step_ms": 1000 * decoding, "prompt_token_us": 1e6 * prompt_token, "decoding_us": 0.0}


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def line(routing: str, measured: Sequence[Measured]) -> dict[str, object]:
    prompt_tokens = sum(one.prompt_tokens for one in measured)
    cached = sum(one.cached_tokens for one in measured)
    first = [1000 * one.first_seconds for one in measured]
    return {
        "routing": routing,
        "requests": len(measured),
        "prompt_tokens": prompt_tokens,
        "hit_tokens": cached,
        "hit_share": round(cached / prompt_tokens, 3),
        "first_token_ms_p50": round(quantile(first, 0.5)),
        "first_token_ms_p90": round(quantile(first, 0.9)),
        "total_seconds_mean": round(sum(one.total_seconds for one in measured) / len(measured), 2),
    }


async def rounds(urls: Sequence[str], options: argparse.Namespace) -> None:
    dice = random.Random(options.seed)
    results: dict[str, list[Measured]] = {routing: [] for routing in options.routings}
    traces = []
    async with AsyncExitStack() as stack:
        clients = {}
        for routing in options.routings:
            client = ClusterClient(
                list(urls), model="paged_llm", routing=routing, tokenizer="none: prompts are token ids"
            )
            clients[routing] = await stack.enter_async_context(client)
        cost = await step_cost(clients[options.routings[-1]], len(urls), dice)
        print(json.dumps({name: round(value, 3) for name, value in cost.items()}), flush=True)
        for number in range(options.rounds):
            trace = make_trace(options, dice)
            traces.append(trace)
            for routing in options.routings if number % 2 == 0 else reversed(options.routings):
                results[routing] += await measure(clients[routing], trace, dice)
                print(json.dumps(line(routing, results[routing])), flush=True)
    if options.trace is not None:
        options.trace.write_text("".join(json.dumps(asdict(asked)) + "\n" for trace in traces for asked in trace))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--routings", nargs="+", default=["kv", "turns", "least"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60, help="of a round")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second, of all servers")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-tokens", type=int, default=512)
    parser.add_argument("--own-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=8)
    parser.add_argument("--num-pages", type=int, default=224, help="of each server's pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cluster-"))
        urls = []
        for number in range(options.servers):
            engine = {
                "num_pages": options.num_pages,
                "page_size": PAGE_SIZE,
                "max_model_len": 1024,
                "dtype": "float32",
                "standby_engine": False,
            }
            settings = ServerSettings(
                instances=1, options=engine | {"kv_events": f"ipc://{folder}/{number}"}, drain_seconds=3
            )
            urls.append(stack.enter_context(Server(settings)).addresses.grpc_url)
        asyncio.run(rounds(urls, options))


if __name__ == "__main__":
    main()
