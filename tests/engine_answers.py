"""Engines on a CPU without processes around them, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams


def load(folder: Path, directory: Path, **options: object) -> Engine:
    """directory: where the engine may leave files."""
    engine, *_ = load_engine(
        EngineConfig.parse({"model": str(folder), "device": "cpu", "speculation": "off", **options}), directory
    )
    return engine


def answers(
    engine: Engine, prompts: list[np.ndarray], after_step: Callable[[], None] = lambda: None, **sampling: object
) -> list[list[int]]:
    """Each prompt's tokens, greedy unless `sampling` says otherwise. After every step the engine's invariants are
    checked.
    """
    params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
    tokens: list[list[int]] = [[] for _ in prompts]
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))
    while not engine.idle:
        for output in engine.step():
            assert all(finish.error is None for finish in output.finishes), output.finishes
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
        engine.check()
        after_step()
    return tokens
