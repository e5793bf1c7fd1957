"""Host cost of a decode step: microseconds of schedule() and commit() for N running sequences, prefix cache on. Prints
JSON lines.

    python -m tests.bench.bench_scheduler --sequences 256 --steps 400

The sequences decode steadily: every page_size-th token of each needs a new page and publishes a full one, as in
production. total_loops: the same in turns of the Python loop that is timed beside it (yardstick.py), which slower
machines need as many of. vLLM 0.24.0 on a two-core machine took 1,667 us in schedule() and 615 us in
update_from_output() for the same 256 sequences; what it takes on another machine has to be measured there.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from paged_backend.batch import StepResult
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.bench.yardstick import print_row, python_loops


def measure(num_sequences: int, steps: int, page_size: int, prefix_cache: bool) -> dict[str, object]:
    prompt_len, max_model_len = 128, 128 + steps + 64
    limits = SchedulerLimits(
        page_size=page_size,
        num_pages=num_sequences * (max_model_len // page_size + 2),
        max_model_len=max_model_len,
        max_num_sequences=num_sequences,
        max_batched_tokens=max(8192, num_sequences),
        prefix_cache=prefix_cache,
    )
    scheduler = Scheduler(limits)
    random = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=max_model_len - prompt_len, temperature=0.0, ignore_eos=True)
    for serial in range(num_sequences):
        # page borders at different steps
        prompt = random.integers(0, 32000, prompt_len - serial % page_size, dtype=np.int32)
        scheduler.submit(Submit(serial, prompt.tobytes(), sampling, (), "", time.monotonic()))
    schedule_us, commit_us = [], []
    tokens = random.integers(0, 32000, (steps + 64, num_sequences), dtype=np.int32)
    for step in range(steps + 32):
        start = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        assert batch is not None
        result = StepResult(tokens[step, : int(batch.samples.sum())])
        before_commit = time.perf_counter()
        scheduler.commit(batch, result)
        end = time.perf_counter()
        if batch.num_sequences == num_sequences and batch.num_tokens == num_sequences:
            schedule_us.append((middle - start) * 1e6)
            commit_us.append((end - before_commit) * 1e6)
    assert len(schedule_us) >= steps - 32, "the batch was not steady"
    schedule, commit = statistics.median(schedule_us), statistics.median(commit_us)
    return {
        "bench": "scheduler",
        "sequences": num_sequences,
        "page_size": page_size,
        "prefix_cache": prefix_cache,
        "steps": len(schedule_us),
        "schedule_us": round(schedule, 1),
        "commit_us": round(commit, 1),
        "total_us": round(schedule + commit, 1),
        "total_loops": round((schedule + commit) * python_loops()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="sequences running at once")
    parser.add_argument("--steps", type=int, default=400, help="measured decode steps")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--no-prefix-cache", dest="prefix_cache", action="store_false")
    args = parser.parse_args()
    print_row(measure(args.sequences, args.steps, args.page_size, args.prefix_cache))


if __name__ == "__main__":
    main()
