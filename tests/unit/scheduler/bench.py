"""A scheduler with a simulated runner, and everything that came of its steps."""

from __future__ import annotations

import numpy as np

from paged_backend.batch import Batch
from paged_backend.engine.engine import Engine
from paged_backend.messages import Finish, Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner

VOCAB = 97


class Bench:
    """An engine on a simulated runner, and what its callers have heard."""

    def __init__(self, *, steps_ahead: int = 0, **limits: object) -> None:
        defaults = {
            "page_size": 4,
            "num_pages": 16,
            "max_model_len": 64,
            "max_num_sequences": 8,
            "max_batched_tokens": 64,
        }
        self.limits = SchedulerLimits(**(defaults | limits))  # type: ignore[arg-type]
        self.now = 0.0
        self.scheduler = Scheduler(self.limits, clock=lambda: self.now)
        self.batches: list[Batch] = []
        runner = SimulatedRunner(
            self.limits.max_num_sequences,
            self.limits.num_pages,
            self.limits.page_size,
            self.limits.max_model_len,
            10**6,
            VOCAB,
        )
        self.runner = runner
        launch = runner.launch
        runner.launch = lambda batch: (self.batches.append(batch), launch(batch))[1]  # type: ignore[method-assign]
        self.engine = Engine(self.scheduler, runner, steps_ahead)
        self.tokens: dict[int, list[int]] = {}
        self.finishes: dict[int, Finish] = {}
        self.started: dict[int, int] = {}

    def submit(
        self, request_id: int, prompt: list[int], salt: str = "", family: int | None = None, **sampling: object
    ) -> None:
        params = SamplingParams(**({"max_tokens": 4, "temperature": 0.0} | sampling))  # type: ignore[arg-type]
        self.tokens[request_id] = []
        self.engine.submit(Submit(request_id, np.array(prompt, np.int32).tobytes(), params, (), salt, self.now, family))

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            for output in self.engine.step():
                for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                    self.tokens[request_id].append(token)
                self.started |= output.started
                self.finishes |= {finish.request_id: finish for finish in output.finishes}
            self.engine.check()

    def run(self) -> None:
        for _ in range(2000):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError("the engine does not come to rest")
