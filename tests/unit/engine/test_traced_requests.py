"""When a traced request was let in is told with its first token, once; of others nothing is told."""

from __future__ import annotations

import time

import numpy as np

from paged_backend.engine.engine import Engine
from paged_backend.engine.process import _tokens
from paged_backend.engine_client.live_requests import pieces_of
from paged_backend.messages import Submit, decode_from_engine, encode, front_ends_of, request_id_of
from paged_backend.request import SamplingParams
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner

LIMITS = SchedulerLimits(page_size=4, num_pages=24, max_model_len=64, max_num_sequences=1, max_batched_tokens=32)


def test_a_traced_requests_admission_is_told_once_and_to_its_own_front_end() -> None:
    runner = SimulatedRunner(
        LIMITS.max_num_sequences, LIMITS.num_pages, LIMITS.page_size, LIMITS.max_model_len, LIMITS.max_batched_tokens
    )
    engine = Engine(Scheduler(LIMITS), runner, 0)
    prompt, sampling = np.arange(9, dtype=np.int32).tobytes(), SamplingParams(max_tokens=3, temperature=0.0)
    first, second, other = request_id_of(0, 1), request_id_of(0, 2), request_id_of(1, 1)
    submitted = time.monotonic()
    engine.submit(Submit(first, prompt, sampling, (), "", submitted, traced=True))
    engine.submit(Submit(second, prompt, sampling, (), "", submitted))
    engine.submit(Submit(other, prompt, sampling, (), "", submitted, traced=True))
    told: dict[int, list[float]] = {0: [], 1: []}
    num_tokens = dict.fromkeys((first, second, other), 0)
    while not engine.idle:
        for output in engine.step():
            for front_end in told:
                message = decode_from_engine(
                    encode(_tokens(output, front_ends_of(output.request_ids) == front_end, (), ()))
                )
                for request_id, piece in pieces_of(message).items():
                    num_tokens[request_id] += len(piece.token_ids)
                    if piece.admitted is not None:
                        assert num_tokens[request_id] == 1
                        told[front_end].append(piece.admitted)
    assert set(num_tokens.values()) == {3}
    assert [len(times) for times in told.values()] == [1, 1]
    assert submitted <= told[0][0] <= told[1][0] <= time.monotonic(), "one row: the last waits for the others"
