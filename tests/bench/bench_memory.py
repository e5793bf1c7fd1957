"""Memory truth: how much of the held KV memory holds tokens, and how many sequences that lets run, paged against
reserved. Prints JSON lines.

    python -m tests.bench.bench_memory

Both runs have the same bytes of KV memory, the same 256 requests and the same code; only page_size differs: 16, or
max_model_len, which reserves room for the longest possible sequence as systems before PagedAttention did (Kwon et al.,
SOSP 2023, measured 20-38 % useful memory there). Scheduler, pool and prefix cache are the real ones; no model runs,
since lengths alone decide memory.

Lengths are ShareGPT-like: log-normal with the means that paper states for ShareGPT (161 tokens in, 338 out), sigma 1.2
and 0.9, cut at 1 … max_model_len / 2. Utilisation is live tokens / slots held, averaged over the steps in which
requests still wait, i.e. memory is what limits.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray

from paged_backend.batch import StepResult
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler


def log_normal(random: np.random.Generator, mean: float, sigma: float, size: int, limit: int) -> NDArray[np.int64]:
    return np.clip(random.lognormal(np.log(mean) - sigma**2 / 2, sigma, size).round().astype(np.int64), 1, limit)


def run(
    page_size: int,
    pool_tokens: int,
    max_model_len: int,
    prompts: NDArray[np.int64],
    answers: NDArray[np.int64],
    seed: int,
) -> dict[str, object]:
    limits = SchedulerLimits(
        page_size=page_size,
        num_pages=pool_tokens // page_size,
        max_model_len=max_model_len,
        max_num_sequences=len(prompts),
        max_batched_tokens=8192,
        max_queue_size=len(prompts),
        # the prompts have nothing in common; what is kept for later must not count as waste or as use
        prefix_cache=False,
    )
    scheduler = Scheduler(limits)
    random = np.random.default_rng(seed)
    for serial, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = random.integers(0, 32000, prompt, dtype=np.int32)
        scheduler.submit(
            Submit(
                serial,
                tokens.tobytes(),
                SamplingParams(max_tokens=int(answer), ignore_eos=True),
                (),
                "",
                time.monotonic(),
            )
        )
    running, utilisation, steps, peak = [], [], 0, 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        steps += 1
        peak = max(peak, scheduler.num_running)
        if scheduler.num_waiting:
            running.append(scheduler.num_running)
            utilisation.append(scheduler.live_tokens() / (scheduler.pool.num_held * page_size))
        scheduler.commit(batch, StepResult(np.zeros(int(batch.samples.sum()), np.int32)))
    return {
        "bench": "memory",
        "kind": "reserved" if page_size == max_model_len else "paged",
        "page_size": page_size,
        "pool_tokens": pool_tokens,
        "requests": len(prompts),
        "mean_prompt": round(float(prompts.mean()), 1),
        "mean_answer": round(float(answers.mean()), 1),
        "steps": steps,
        "steps_with_waiting": len(running),
        "utilisation": round(float(np.mean(utilisation)), 4),
        "running_mean": round(float(np.mean(running)), 1),
        "running_peak": peak,
        "preemptions": scheduler.num_preemptions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--pool-sequences", type=int, default=16, help="KV memory, in sequences of max_model_len")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    prompts = log_normal(random, 161, 1.2, args.requests, args.max_model_len // 2)
    answers = log_normal(random, 338, 0.9, args.requests, args.max_model_len // 2 - 1)
    pool_tokens = args.pool_sequences * args.max_model_len
    reserved = run(args.max_model_len, pool_tokens, args.max_model_len, prompts, answers, args.seed)
    print(json.dumps(reserved))
    for page_size in args.page_sizes:
        paged = run(page_size, pool_tokens, args.max_model_len, prompts, answers, args.seed)
        print(json.dumps(paged | {"concurrency_ratio": round(paged["running_mean"] / reserved["running_mean"], 2)}))  # type: ignore[operator]


if __name__ == "__main__":
    main()
