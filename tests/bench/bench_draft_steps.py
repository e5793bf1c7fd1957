"""Host cost of a decode step with speculation beside one without: microseconds that the scheduler, and laying the step
out, compute for N running sequences; no model and no device. Prints JSON lines.

    python -m tests.bench.bench_draft_steps --sequences 1 8 64

Texts: `new`, in which no two tokens stand beside each other again, so that nothing is guessed from it, and what a model
guesses is wrong; `circles`, which repeats itself after 40 tokens, so that all guesses are right. A step is scheduled
before the result of the one before is known, as on a GPU. The kinds take turns, step by step. `model` is auto with a
model that makes the guesses. times: what a step takes, off's times; tokens: that it brings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from paged_backend.batch import Batch, StepResult
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_backend.runner.step_sections import sections_of
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler

KINDS: dict[str, dict[str, object]] = {
    "off": {"num_drafts": 0},
    "ngram": {"drafts_from_text": True},
    "auto": {"drafts_from_text": True, "drafts_must_pay": True},
    "model": {"drafts_must_pay": True},
}
VOCAB = 100_000
PROMPT_LEN = 128


def new(row: int, places: np.ndarray) -> np.ndarray:
    return (places * 7919 + row * 613) % VOCAB


def circles(row: int, places: np.ndarray) -> np.ndarray:
    return places % 40 + 100 * row


TEXTS = {"new": new, "circles": circles}


class Served:
    """A scheduler whose sequences say a text, and what its steps take."""

    def __init__(self, kind: str, text: str, num_sequences: int, steps: int, num_drafts: int) -> None:
        self._text: Callable[[int, np.ndarray], np.ndarray] = TEXTS[text]
        self._right = text == "circles"
        max_len = PROMPT_LEN + (steps + 100) * (1 + num_drafts)
        options = {"num_drafts": num_drafts} | KINDS[kind]
        limits = SchedulerLimits(
            page_size=16,
            num_pages=num_sequences * (max_len // 16 + 2),
            max_model_len=max_len,
            max_num_sequences=num_sequences,
            max_batched_tokens=8192,
            **options,  # type: ignore[arg-type]
        )
        self._seconds, self._entered = 0.0, time.perf_counter()  # that its steps have taken; when the newest began
        self._scheduler = Scheduler(limits, clock=lambda: self._seconds + time.perf_counter() - self._entered)
        sampling = SamplingParams(max_tokens=max_len - PROMPT_LEN, temperature=0.0, ignore_eos=True)
        for number in range(num_sequences):
            prompt = self._text(number, np.arange(PROMPT_LEN)).astype(np.int32)
            self._scheduler.submit(Submit(number, prompt.tobytes(), sampling, (), "", time.monotonic()))
        self._lengths = [PROMPT_LEN] * num_sequences  # of each request
        self._in_flight: deque[tuple[Batch, StepResult]] = deque()
        self.microseconds: list[float] = []
        self.num_tokens = 0

    def step(self) -> None:
        self._entered = time.perf_counter()
        started = time.thread_time()
        batch = self._scheduler.schedule()
        assert batch is not None
        plan = plan_step(batch, shape_of(batch))
        if batch.new_rows or len(batch.page_updates) or batch.drafts is not None:
            sections_of(batch, plan)
        launched = time.thread_time()
        self._in_flight.append((batch, self._result(batch)))
        if len(self._in_flight) > 1:
            done, result = self._in_flight.popleft()
            begun = time.thread_time()
            self._scheduler.commit(done, result)
            self.microseconds.append((launched - started + time.thread_time() - begun) * 1e6)
            self.num_tokens += int((result.token_ids >= 0).sum())
        self._seconds += time.perf_counter() - self._entered

    def _result(self, batch: Batch) -> StepResult:
        token_ids = []
        drafts = [0] * batch.num_sequences if batch.drafts is None else batch.drafts.counts.tolist()
        for request_id, num_drafts, samples in zip(
            batch.request_ids.tolist(), drafts, batch.samples.tolist(), strict=True
        ):
            if samples:
                first, num_right = self._lengths[request_id], num_drafts if self._right else 0
                self._lengths[request_id] += 1 + num_right
                token_ids += self._text(request_id, np.arange(first, first + 1 + num_right)).tolist()
                token_ids += [-1] * (num_drafts - num_right)
        return StepResult(np.array(token_ids, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64], help="sequences running at once")
    parser.add_argument("--steps", type=int, default=600, help="measured decode steps")
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    args = parser.parse_args()
    for text in args.texts:
        for num_sequences in args.sequences:
            served = {kind: Served(kind, text, num_sequences, args.steps, args.drafts) for kind in ("off", *args.kinds)}
            for number in range(args.steps + 80):
                for one in served.values():
                    if number == 80:  # the first are to warm up
                        one.microseconds, one.num_tokens = [], 0
                    one.step()
            off = statistics.mean(served["off"].microseconds)
            row: dict[str, object] = {"bench": "draft_steps", "text": text, "sequences": num_sequences}
            for kind, one in served.items():
                mean = statistics.mean(one.microseconds)
                row[f"{kind}_us"] = round(statistics.median(one.microseconds), 1)
                row[f"{kind}_mean_us"] = round(mean, 1)
                row[f"{kind}_times"] = round(mean / off, 3)
                row[f"{kind}_tokens"] = round(one.num_tokens / len(one.microseconds) / num_sequences, 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
