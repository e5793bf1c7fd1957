"""`python -m tools.cluster_sim`: a line of JSON for each routing and number of servers.

python -m tools.cluster_sim --servers 3 10 100 1000                       # shared heads
python -m tools.cluster_sim --trace conversations --servers 3 10 100
python -m tools.cluster_sim --recorded trace.jsonl --num-pages 224 --max-model-len 1024   # what bench_cluster asked
real servers python -m tools.cluster_sim --fit-mix                                     # a prompt token's share of a
step, from the measured mix
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paged_backend.scheduler.limits import SchedulerLimits
from tools.cluster_sim import traces
from tools.cluster_sim.costs import COSTS, StepCost
from tools.cluster_sim.routers import KvAware, Least, Random, Router, Turns
from tools.cluster_sim.simulation import Outcome, simulate

PAGE_SIZE = 16
ROUTINGS = ("random", "turns", "least", "kv")
MIX_TOKENS, MIX_TOKENS_A_SECOND = 133_966, 8_491  # Llama-3.1-8B, docs/performance.md: 256 requests at once


def router_of(name: str, num_servers: int, seed: int) -> Router:
    match name:
        case "random":
            return Random(num_servers, seed)
        case "turns":
            return Turns(num_servers, seed)
        case "least":
            return Least(num_servers, seed)
    return KvAware(num_servers, seed, PAGE_SIZE)


def limits_of(options: argparse.Namespace) -> SchedulerLimits:
    return SchedulerLimits(
        page_size=PAGE_SIZE,
        num_pages=options.num_pages,
        max_model_len=options.max_model_len,
        max_num_sequences=options.max_num_sequences,
        max_batched_tokens=options.max_batched_tokens,
        max_waiting_seconds=1e9,
        request_deadline_seconds=1e9,
    )


def traces_of(options: argparse.Namespace, num_servers: int) -> list[list[traces.Request]]:
    """Rounds, each with servers that know nothing of the one before."""
    if options.recorded is not None:
        return list(traces.recorded(options.recorded, options.seed))
    num_requests, rate = options.requests * num_servers, options.rate * num_servers
    if options.trace == "conversations":
        return [traces.conversations(num_requests, rate, options.seed, options.max_model_len)]
    num_heads = max(1, round(options.heads * num_servers))
    return [
        traces.shared_heads(
            num_requests, rate, num_heads, options.head_tokens, options.own_tokens, options.output_tokens, options.seed
        )
    ]


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    whole = Outcome()
    for outcome in outcomes:
        whole.prompt_tokens += outcome.prompt_tokens
        whole.hit_tokens += outcome.hit_tokens
        whole.first_seconds += outcome.first_seconds
        whole.total_seconds += outcome.total_seconds
    return whole


def fit_mix(cost: StepCost) -> float:
    """Seconds of a prompt token that make the mix take as long as it was measured to take. The simulated time grows
    with it.
    """
    dice = random.Random(0)  # as bench_engine's mix draws them
    prompts = [[dice.randint(0, 10000) for _ in range(dice.randint(100, 1024))] for _ in range(256)]
    answers = [dice.randint(100, 1024) for _ in prompts]
    assert sum(answers) == MIX_TOKENS
    trace = [
        traces.Request(0.0, np.array(prompt, np.int32), answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    limits = SchedulerLimits(PAGE_SIZE, 40_000, 2112, 256, 2048)
    low, high = 0.0, 200e-6
    for _ in range(12):
        middle = (low + high) / 2
        outcome = simulate(trace, 1, Random(1, 0), dataclasses.replace(cost, prompt_token=middle), limits)
        low, high = (middle, high) if outcome.output_tokens / outcome.end > MIX_TOKENS_A_SECOND else (low, middle)
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[3])
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--cost", choices=list(COSTS), default="llama-3.1-8b-h100")
    parser.add_argument(
        "--step-cost",
        type=float,
        nargs=3,
        metavar=("STEP_MS", "PROMPT_TOKEN_US", "DECODING_US"),
        help="instead of --cost",
    )
    parser.add_argument("--trace", choices=("heads", "conversations"), default="heads")
    parser.add_argument("--recorded", type=Path)
    parser.add_argument("--requests", type=int, default=40, help="a server")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second and server")
    parser.add_argument("--heads", type=float, default=4, help="a server")
    parser.add_argument("--head-tokens", type=int, default=1024)
    parser.add_argument("--own-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--num-pages", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-sequences", type=int, default=64)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit-mix", action="store_true")
    options = parser.parse_args()
    if options.fit_mix:
        print(json.dumps({"prompt_token_us": round(1e6 * fit_mix(COSTS[options.cost]), 2)}))
        return
    cost = COSTS[options.cost]
    if options.step_cost is not None:
        cost = StepCost(1e-3 * options.step_cost[0], 1e-6 * options.step_cost[1], 1e-6 * options.step_cost[2])
    for num_servers in options.servers:
        rounds = traces_of(options, num_servers)
        for routing in options.routings:
            started = time.monotonic()
            limits = limits_of(options)
            outcomes = [
                simulate(trace, num_servers, router_of(routing, num_servers, options.seed), cost, limits)
                for trace in rounds
            ]
            said = {
                "servers": num_servers,
                "routing": routing,
                "requests": sum(map(len, rounds)),
                **joined(outcomes).line(),
            }
            print(json.dumps(said | {"simulated_in_seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    main()
