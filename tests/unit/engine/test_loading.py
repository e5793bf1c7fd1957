"""What a start says of how long steps will take."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from paged_backend.batch import Batch
from paged_backend.config import EngineConfig
from paged_backend.engine.loading import about_pace, load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.step_budget import LEAST_TOKENS

ONE = np.ones(1, np.int32)
TIMED = Batch(1, 0 * ONE, 0 * ONE, 2047 * ONE, ONE > 0, np.zeros(1, np.int64)), 0.0556


@pytest.mark.parametrize(
    ("bound", "timed", "words"),
    [
        (0.0, TIMED, ["max_step_seconds=0: prompts have all tokens of a step"]),
        (0.2, None, ["within 0.2 s (max_step_seconds), 32 at least", "learnt from the first ones"]),
        (0.05, TIMED, ["within 0.05 s", "2047 take 0.056 s now"]),
    ],
)
def test_the_log_says_how_long_prompts_may_keep_others_waiting(
    bound: float, timed: tuple[Batch, float] | None, words: list[str]
) -> None:
    said = about_pace(bound, timed)
    assert all(word in said for word in words), said


def test_a_start_says_it_and_steps_keep_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "paged"):
        engine, *_ = load_engine(EngineConfig.parse({"device": "cpu", "max_step_seconds": "0.000001"}), tmp_path)
    assert "within 1e-06 s" in caplog.text
    batches, launch = [], engine._runner.launch
    engine._runner.launch = lambda batch: (batches.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    for request_id, length in ((0, 4), (1, 300)):
        prompt = np.arange(20, 20 + length, dtype=np.int32)
        sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", 1e18))
        engine.step()
    assert [batch.counts.tolist() for batch in batches] == [[4], [1, LEAST_TOKENS]]
