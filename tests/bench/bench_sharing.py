"""Pages saved by sharing, for parallel sampling and beam search, as in the PagedAttention paper (Kwon et al., SOSP
2023, section 6.3). Prints JSON lines.

    python -m tests.bench.bench_sharing

Scheduler, pool and beam rooms are the real ones; no model runs. Lengths are log-normal with the means that the paper
states for Alpaca (19 tokens in, 58 out) and ShareGPT (161 in, 338 out), cut as it cuts them at 2,048 in all. Saved is 1
- pages held / pages held without sharing, both averaged over all steps; the paper found 6.1 - 9.8 % on Alpaca and 16.2
- 30.5 % on ShareGPT for parallel sampling (2 to 6 sequences), 37.6 - 55.2 % and 44.3 - 66.3 % for beam search (width 2
to 6).

What a beam search shares in its answers depends on how often beams are dropped, which is the model's doing. Here a
stand-in decides: a continuation's log-probability falls from rank to rank by --spread nats on average. The smaller it
is, the more often one beam's continuations drive the others out. `--checkpoint FOLDER` asks a model on the CPU instead,
slowly, about prompts of random tokens; "demo" is the model that comes with paged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paged_backend.batch import Batch, BeamCandidates, BeamRows, StepResult
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.bench.bench_memory import log_normal

PAGE_SIZE = 16
MAX_MODEL_LEN = 2048
WORKLOADS = {"alpaca": (19, 0.6, 58, 0.8), "sharegpt": (161, 1.2, 338, 0.9)}  # mean and sigma of prompts, of answers
VOCAB = 32000


class Pages:
    """Held over the steps, against what the runners would hold if no page had two holders."""

    def __init__(self) -> None:
        self.held = self.unshared = self.steps = 0

    def look(self, scheduler: Scheduler) -> None:
        self.steps += 1
        self.held += scheduler.pool.num_held
        self.unshared += sum(len(runner.page_table) for sequence in scheduler.sequences for runner in sequence.runners)


def stand_in(spread: float, random: np.random.Generator) -> Callable[[Batch], StepResult]:
    """Results of a step without a model."""

    def result(batch: Batch) -> StepResult:
        num_sampled = int(batch.samples.sum())
        answers = []
        for ask in batch.asks:
            assert isinstance(ask, BeamRows)
            shape = len(ask.sampled), ask.num_candidates
            logprobs = -np.cumsum(random.exponential(spread, shape), axis=1).astype(np.float32)
            token_ids = np.argsort(random.random((shape[0], 4 * shape[1])), axis=1)[:, : shape[1]].astype(np.int32)
            answers.append(BeamCandidates(token_ids, logprobs))
        return StepResult(random.integers(100, VOCAB, num_sampled, dtype=np.int32), answers=tuple(answers))

    return result


def sampling_of(kind: str, width: int, answer: int) -> SamplingParams:
    if kind == "beam":
        return SamplingParams(
            use_beam_search=True, beam_width=width, n=1, temperature=0.0, max_tokens=answer, ignore_eos=True
        )
    return SamplingParams(temperature=1.0, max_tokens=answer, ignore_eos=True)


def submit(engine: Engine | Scheduler, kind: str, width: int, prompts: list[np.ndarray], answers: list[int]) -> None:
    request_id = 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for _ in range(width if kind == "parallel" else 1):
            params = sampling_of(kind, width, answer)
            engine.submit(
                Submit(
                    request_id,
                    prompt.tobytes(),
                    params,
                    (),
                    "",
                    time.monotonic(),
                    number if kind == "parallel" else None,
                )
            )
            request_id += 1


def run_scheduler(
    kind: str, width: int, prompts: list[np.ndarray], answers: list[int], spread: float, seed: int
) -> Pages:
    num_rows = width * len(prompts)
    num_pages = num_rows * MAX_MODEL_LEN // PAGE_SIZE
    scheduler = Scheduler(
        SchedulerLimits(
            PAGE_SIZE, num_pages, MAX_MODEL_LEN, num_rows, 16384, max_queue_size=num_rows, prefix_cache=False
        )
    )
    submit(scheduler, kind, width, prompts, answers)
    pages, result = Pages(), stand_in(spread, np.random.default_rng(seed))
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        pages.look(scheduler)
        scheduler.commit(batch, result(batch))
    scheduler.check()
    return pages


def run_engine(checkpoint: str, kind: str, width: int, prompts: list[np.ndarray], answers: list[int]) -> Pages:
    options = {
        "model": checkpoint,
        "device": "cpu",
        "max_num_sequences": width * len(prompts),
        "prefix_cache": False,
        "max_batched_tokens": 4096,
        "speculation": "off",
    }
    with tempfile.TemporaryDirectory() as folder:
        engine, scheduler, ready = load_engine(EngineConfig.parse(options), Path(folder))
        longest = ready.max_model_len
        prompts = [prompt[: longest // 2] % ready.vocab_size for prompt in prompts]
        submit(engine, kind, width, prompts, [min(answer, longest // 2) for answer in answers])
        pages = Pages()
        while not engine.idle:
            engine.step()
            pages.look(scheduler)
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--parallel", type=int, nargs="*", default=[2, 4, 6, 8, 16])
    parser.add_argument("--beams", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--spread", type=float, default=1.0)
    parser.add_argument("--checkpoint", default="", help="a folder, or demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for workload in args.workloads:
        prompt_mean, prompt_sigma, answer_mean, answer_sigma = WORKLOADS[workload]
        random = np.random.default_rng(args.seed)
        lengths = log_normal(random, prompt_mean, prompt_sigma, args.requests, MAX_MODEL_LEN // 2)
        answers = log_normal(random, answer_mean, answer_sigma, args.requests, MAX_MODEL_LEN // 2 - 1).tolist()
        prompts = [random.integers(100, VOCAB, length, dtype=np.int32) for length in lengths]
        for kind, width in [("parallel", width) for width in args.parallel] + [("beam", width) for width in args.beams]:
            if args.checkpoint:
                pages = run_engine(args.checkpoint, kind, width, prompts, answers)
            else:
                pages = run_scheduler(kind, width, prompts, answers, args.spread, args.seed)
            told = {
                "bench": "sharing",
                "workload": workload,
                "kind": kind,
                "width": width,
                "requests": args.requests,
                "mean_prompt": round(float(lengths.mean()), 1),
                "mean_answer": round(float(np.mean(answers)), 1),
                "steps": pages.steps,
                "saved": round(1 - pages.held / pages.unshared, 4),
            }
            print(
                json.dumps(
                    told
                    | (
                        {"model": args.checkpoint}
                        if args.checkpoint
                        else {"spread": args.spread}
                        if kind == "beam"
                        else {}
                    )
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
