"""hypothesis drives scheduler, pool and prefix cache as one state machine; every rule is followed by `check()`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_backend.batch import StepOutput
from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine
from paged_backend.messages import Found, Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import Proposer, SimulatedRunner, solo, solo_search

EOS = 5


class Scheduling(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.integers(0, 12),
        max_model_len=st.integers(2, 40),
        rows=st.integers(1, 6),
        budget=st.integers(1, 80),
        steps_ahead=st.integers(0, 1),
        prefix_cache=st.booleans(),
        preemption=st.booleans(),
        windows=st.sampled_from([(None,), (None,), (5,), (None, 5), (None, 9, 1), (7, 2, 2)]),
        num_drafts=st.sampled_from([0, 0, 1, 3, 8]),
        quality=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        drafts_from_text=st.booleans(),
        drafts_must_pay=st.booleans(),
        max_step_seconds=st.sampled_from([0.0, 1e-9, 0.03, 0.1]),
    )
    def start(
        self,
        page_size: int,
        spare_pages: int,
        max_model_len: int,
        rows: int,
        budget: int,
        steps_ahead: int,
        prefix_cache: bool,
        preemption: bool,
        windows: tuple[int | None, ...],
        num_drafts: int,
        quality: float,
        drafts_from_text: bool,
        drafts_must_pay: bool,
        max_step_seconds: float,
    ) -> None:
        num_pages = -(-max_model_len // page_size) * len(windows) + spare_pages
        self.now = 0.0
        self.limits = SchedulerLimits(
            page_size=page_size,
            num_pages=num_pages,
            max_model_len=max_model_len,
            max_num_sequences=rows,
            max_batched_tokens=budget,
            max_queue_size=8,
            max_waiting_seconds=1000,
            request_deadline_seconds=2000,
            prefix_cache=prefix_cache,
            preemption=preemption,
            eos_ids=(EOS,),
            windows=windows,
            num_drafts=num_drafts,
            drafts_from_text=drafts_from_text,
            drafts_must_pay=drafts_must_pay,
            max_step_seconds=max_step_seconds,
        )
        self.random = np.random.default_rng(num_pages)
        self.scheduler = Scheduler(self.limits, clock=self.clock)
        propose = Proposer(quality, 97, windows)
        self.runner = SimulatedRunner(
            rows, num_pages, page_size, max_model_len, budget, windows=windows, propose=propose
        )
        bounds = TableBounds(rows, num_pages, page_size, max_model_len, budget, windows)
        self.engine = Engine(self.scheduler, CheckedRunner(self.runner, bounds, self.scheduler.check), steps_ahead)
        self.expected: dict[int, tuple[list[int], str]] = {}
        self.answers: dict[int, list[int]] = {}
        self.searches: dict[int, list[list[int]]] = {}
        self.widths: dict[int, int] = {}
        self.arrival_index = 0

    def clock(self) -> float:
        """Steps take what they take, some longer than others."""
        self.now += float(self.random.exponential(0.001))
        return self.now

    @rule(
        prompt=st.lists(st.integers(6, 8), min_size=1, max_size=39),  # few tokens: many common prefixes
        max_tokens=st.integers(1, 30),
        ignore_eos=st.booleans(),
        salt=st.sampled_from(["", "", "tenant"]),
        siblings=st.sampled_from([0, 0, 1, 3]),
    )
    def submit(self, prompt: list[int], max_tokens: int, ignore_eos: bool, salt: str, siblings: int) -> None:
        family = self.arrival_index if siblings else None
        for _ in range(1 + siblings):
            self._submit_one(prompt, max_tokens, ignore_eos, salt, family)

    def _submit_one(self, prompt: list[int], max_tokens: int, ignore_eos: bool, salt: str, family: int | None) -> None:
        self.arrival_index += 1
        request_id = self.arrival_index
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, temperature=0.0)
        refused = self.scheduler.num_waiting >= self.limits.max_queue_size or len(prompt) >= self.limits.max_model_len
        self.engine.submit(
            Submit(request_id, np.array(prompt, np.int32).tobytes(), sampling, (), salt, self.now, family)
        )
        if refused:
            self.expected[request_id] = ([], "")
        else:
            length = min(max_tokens, self.limits.max_model_len - len(prompt))
            answer = solo(prompt, length, () if ignore_eos else (EOS,), self.runner.vocab_size, self.limits.windows)
            self.expected[request_id] = (answer, "stop" if answer[-1] == EOS and not ignore_eos else "length")
        self.answers[request_id] = []

    @rule(
        prompt=st.lists(st.integers(6, 8), min_size=1, max_size=39),
        max_tokens=st.integers(1, 12),
        width=st.integers(2, 5),
        stop_ids=st.lists(st.integers(0, 96), max_size=20).map(tuple),
        length_penalty=st.sampled_from([0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([False, True, "never"]),
    )
    def search(
        self,
        prompt: list[int],
        max_tokens: int,
        width: int,
        stop_ids: tuple[int, ...],
        length_penalty: float,
        early_stopping: bool | str,
    ) -> None:
        self.arrival_index += 1
        request_id = self.arrival_index
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "stop_token_ids": stop_ids}
        sampling = SamplingParams(
            max_tokens=max_tokens, use_beam_search=True, beam_width=width, n=width, temperature=0.0, **options
        )
        self.engine.submit(Submit(request_id, np.array(prompt, np.int32).tobytes(), sampling, (), "", self.now))
        if request_id in self.scheduler._living:  # else refused at once
            length = min(max_tokens, self.limits.max_model_len - len(prompt))
            ends = tuple(dict.fromkeys((EOS, *stop_ids)))
            self.widths[request_id] = width
            self.searches[request_id] = solo_search(
                prompt, sampling, length, ends, self.runner.vocab_size, self.limits.windows
            )

    @precondition(lambda self: self.searches)
    @rule(index=st.integers(0, 10**6))
    def abort_search(self, index: int) -> None:
        request_id = sorted(self.searches)[index % len(self.searches)]
        self.engine.abort(request_id)
        del self.searches[request_id]

    @rule()
    def step(self) -> None:
        self.now += 0.02
        for output in self.engine.step():
            self.receive(output)

    @precondition(lambda self: self.answers)
    @rule(index=st.integers(0, 10**6))
    def abort(self, index: int) -> None:
        request_id = sorted(self.answers)[index % len(self.answers)]
        self.engine.abort(request_id)
        del self.answers[request_id], self.expected[request_id]

    @rule()
    def run_dry(self) -> None:
        self.drain()

    def receive(self, output: StepOutput) -> None:
        assert self.limits.num_drafts or len(set(output.request_ids.tolist())) == len(output.request_ids), (
            "two tokens of one request in one step"
        )
        for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
            assert request_id in self.answers, "a token for a request that is over"
            if not self.answers[request_id]:
                assert request_id in output.started
            self.answers[request_id].append(token)
        for found in output.feature_outputs:
            assert isinstance(found, Found)
            assert [np.frombuffer(one.token_ids, np.int32).tolist() for one in found.sequences] == self.searches.pop(
                found.request_id
            )
        for finish in output.finishes:
            if finish.request_id not in self.expected:
                answers = self.searches.pop(finish.request_id, [])
                assert not answers or (finish.error is not None and len(answers) < self.widths[finish.request_id]), (
                    "a search is over without an answer"
                )
                continue
            answer, reason = self.expected.pop(finish.request_id)
            assert self.answers.pop(finish.request_id) == answer
            assert finish.reason == reason

    def drain(self) -> None:
        for _ in range(5000):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle, "starvation: admitted requests do not finish"
        assert not self.answers and not self.expected and not self.searches
        assert self.scheduler.pool.num_available == self.limits.num_pages, "idle, but pages are held"

    @invariant()
    def invariants_hold(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.drain()


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.long
class TestSchedulingLonger(TestScheduling):  # type: ignore[misc, valid-type]
    settings = settings(TestScheduling.settings, max_examples=600)
