"""What a stream that decodes notices of others' prompts: the gaps between its tokens, and how many prompt tokens a
second are computed beside it, with max_step_seconds and without. Prints JSON lines.

    python -m tests.bench.bench_pace --bounds 0 0.2 0.1

The engine runs in this process, without server and front ends, so a gap is a step or several. All bounds are measured
in one run, in turns; a line has the gaps of all turns of a bound. Prompts are random tokens, none like another, and
wait all at once; each is answered with one token. The stream begins anew where it has reached max_model_len. The model
is the one that comes with paged, on a CPU, unless --set says otherwise.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.runner.placement import leave_a_core
from tests.bench.yardstick import print_row

STREAM_LEN = 16  # tokens of the stream's prompt
REST = 8  # its tokens before the prompts come


class Beside:
    """A stream and prompts beside it, on an engine with one bound: what all turns brought."""

    def __init__(self, bound: float, options: dict[str, str], folder: Path, seed: int) -> None:
        config = EngineConfig.parse(
            {"device": "cpu", "prefix_cache": "false", "speculation": "off"} | options | {"max_step_seconds": bound}
        )
        self._engine, _, self._ready = load_engine(config, folder)
        self._random = np.random.default_rng(seed)
        self._num_requests = 0
        self._stream: int | None = None  # its request id
        self._newest: float | None = None  # when its newest token came
        self.gaps: list[float] = []  # seconds between two of its tokens while prompts were computed
        self.prompt_tokens = 0
        self.seconds = 0.0

    def turn(self, num_prompts: int, prompt_len: int) -> None:
        """Until the prompts are answered; then the engine is idle."""
        for _ in range(REST):
            self._step()
        prompts = {self._submit(prompt_len, max_tokens=1) for _ in range(num_prompts)}
        started = time.perf_counter()
        while prompts:
            gap, over = self._step()
            prompts -= over
            self.gaps += [] if gap is None else [gap]
        self.seconds += time.perf_counter() - started
        self.prompt_tokens += num_prompts * prompt_len
        if self._stream is not None:
            self._engine.abort(self._stream)
            self._stream = None
        while not self._engine.idle:
            self._engine.step()

    def _step(self) -> tuple[float | None, set[int]]:
        """Returns the gap before the stream's next token, if there is one, and the requests that are over."""
        if self._stream is None:
            self._stream, self._newest = self._submit(STREAM_LEN, self._ready.max_model_len - STREAM_LEN), None
        gap, over = None, set()
        for output in self._engine.step():
            over |= {finish.request_id for finish in output.finishes}
            if self._stream in output.request_ids:
                now = time.perf_counter()
                gap = None if self._newest is None else now - self._newest
                self._newest = now
        if self._stream in over:
            self._stream = None
        return gap, over

    def _submit(self, prompt_len: int, max_tokens: int) -> int:
        self._num_requests += 1
        prompt = self._random.integers(8, self._ready.vocab_size, prompt_len, dtype=np.int32)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(Submit(self._num_requests, prompt.tobytes(), sampling, (), "", time.monotonic()))
        return self._num_requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.0, 0.2], help="of max_step_seconds; 0: off")
    parser.add_argument("--prompts", type=int, default=10, help="that wait at once, in each turn")
    parser.add_argument("--prompt-len", type=int, default=1800)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.set)
    leave_a_core(os.environ)  # as the engine's process does
    with tempfile.TemporaryDirectory() as folder:
        measured = {bound: Beside(bound, options, Path(folder), seed=0) for bound in args.bounds}
        for beside in measured.values():  # libraries choose how to compute, memory is touched
            beside.turn(1, args.prompt_len)
            beside.gaps, beside.prompt_tokens, beside.seconds = [], 0, 0.0
        for _ in range(args.turns):
            for beside in measured.values():
                beside.turn(args.prompts, args.prompt_len)
        for bound, beside in measured.items():
            median, p99 = np.percentile(beside.gaps, [50, 99])
            print_row(
                {
                    "bench": "pace",
                    "max_step_seconds": bound,
                    "prompt_len": args.prompt_len,
                    "tokens_of_the_stream": len(beside.gaps),
                    "gap_p50_ms": round(1000 * median, 1),
                    "gap_p99_ms": round(1000 * p99, 1),
                    "gap_max_ms": round(1000 * max(beside.gaps), 1),
                    "prompt_tokens_s": round(beside.prompt_tokens / beside.seconds),
                }
            )


if __name__ == "__main__":
    main()
