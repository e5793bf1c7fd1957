"""Requests with drafts beside those that can have none, many at once: forms, adapters, beams, scored prompts, callers
who leave, and an engine that takes over. Nobody's answer depends on drafts, his own or another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.engine.engine import Engine
from paged_backend.messages import Found
from tests.adapter_oracle import save_adapter
from tests.structured_engine import PROMPT, load_speaker, save_speaker, submit

CIRCLES = {"max_tokens": 40, "ignore_eos": True, "frequency_penalty": -2.0}
KINDS: tuple[dict[str, Any], ...] = (
    CIRCLES | {"temperature": 0},
    CIRCLES | {"seed": 3, "logprobs": 1},
    {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"guided_regex": "(yes, )*no", "max_tokens": 30},
    {"guided_json": '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'},
    CIRCLES | {"seed": 4, "lora_name": "other"},
    {"use_beam_search": True, "beam_width": 3, "n": 2, "max_tokens": 12},
    CIRCLES | {"seed": 5, "prompt_logprobs": 1},
    CIRCLES | {"temperature": 0, "allowed_token_ids": list(range(40, 60))},
    CIRCLES | {"temperature": 0, "speculation": "off"},
)
# rows that a step computes round differently beside others; a wrong position or context changes far more
LOGPROB_TOLERANCE = 1e-4


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.beams: list[list[int]] = []
        self.end: str | None = None

    def told(self) -> tuple[list[int], list[list[int]], str | None]:
        return self.tokens, self.beams, self.end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speaker")
    folder = save_speaker(root / "model")
    save_adapter(root / "adapters" / "other", folder, 1, rank=4, lora_alpha=8)
    return folder


def load(folder: Path, exports: Path, **options: Any) -> Engine:
    given = {"lora_directory": str(folder.parent / "adapters"), "max_lora_rank": 4, "max_loras": 1}
    return load_speaker(folder, exports, **(given | {"num_speculative_tokens": 5, "debug_checks": True} | options))


def ask(engine: Engine, asked: Sequence[Mapping[str, Any]]) -> list[Heard]:
    for request_id, sampling in enumerate(asked):
        submit(engine, request_id, sampling, prompt=PROMPT + PROMPT[: request_id % 7])
    return [Heard() for _ in asked]


def step(engine: Engine, heard: Sequence[Heard]) -> None:
    for output in engine.step():
        for entry, request_id in enumerate(output.request_ids.tolist()):
            heard[request_id].tokens.append(int(output.token_ids[entry]))
            if output.logprobs is not None:
                heard[request_id].logprobs.append(float(output.logprobs[entry]))
        for found in output.feature_outputs:
            if isinstance(found, Found):
                heard[found.request_id].beams = [
                    np.frombuffer(one.token_ids, np.int32).tolist() for one in found.sequences
                ]
        for finish in output.finishes:
            assert finish.error is None, finish.message
            heard[finish.request_id].end = finish.reason


def finish(engine: Engine, heard: Sequence[Heard]) -> None:
    while not engine.idle:
        step(engine, heard)


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    """Of an engine without drafts, one kind of request after another."""
    engine = load(folder, tmp_path_factory.mktemp("plain"), speculation="off")
    asked = [KINDS[number % len(KINDS)] for number in range(64)]
    heard = ask(engine, asked)
    finish(engine, heard)
    assert engine.stats().drafts_proposed == 0
    return heard


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"speculation": "ngram", "max_num_sequences": 64}, marks=pytest.mark.long),
        {"speculation": "ngram", "max_num_sequences": 8, "num_pages": 40, "max_model_len": 160},
        {"speculation": "auto", "max_num_sequences": 12},
    ],
    ids=["64 at once", "8 at once, few pages", "auto"],
)
def test_nobody_s_answer_depends_on_drafts(
    folder: Path, tmp_path: Path, expected: list[Heard], options: dict[str, Any]
) -> None:
    engine = load(folder, tmp_path / "exports", **options)
    heard = ask(engine, [KINDS[number % len(KINDS)] for number in range(64)])
    finish(engine, heard)
    for number, (one, other) in enumerate(zip(heard, expected, strict=True)):
        kind = KINDS[number % len(KINDS)]
        assert one.told() == other.told(), kind
        if "logprobs" in kind:
            assert one.logprobs == pytest.approx(other.logprobs, abs=LOGPROB_TOLERANCE)
    stats = engine.stats()
    assert options["speculation"] == "auto" or stats.drafts_proposed > stats.drafts_accepted > 0
    assert stats.pages_held == 0


def test_callers_who_leave_with_drafts_in_flight_take_nothing_with_them(
    folder: Path, tmp_path: Path, expected: list[Heard]
) -> None:
    engine = load(folder, tmp_path / "exports", speculation="ngram", max_num_sequences=8)
    engine._steps_ahead = 1
    heard = ask(engine, [KINDS[number % len(KINDS)] for number in range(24)])
    gone: set[int] = set()
    while not engine.idle:
        step(engine, heard)
        running = [number for number in set(range(24)) - gone if heard[number].tokens and heard[number].end is None]
        if len(gone) < 8 and len(running) > 3:
            number = running[len(gone) % len(running)]
            gone.add(number)
            engine.abort(number)
    assert len(gone) > 3 and engine.stats().drafts_accepted > 0 and engine.stats().pages_held == 0
    for number in set(range(24)) - gone:
        assert heard[number].told() == expected[number].told()


def test_the_next_engine_goes_on_where_one_died_with_drafts_in_flight(
    folder: Path, tmp_path: Path, expected: list[Heard]
) -> None:
    mine = [number for number in range(20) if "frequency_penalty" in KINDS[number % len(KINDS)]]
    dying = load(folder, tmp_path / "dying", speculation="ngram", max_num_sequences=16)
    dying._steps_ahead = 1
    heard = ask(dying, [KINDS[number % len(KINDS)] for number in range(20)])
    while dying.stats().drafts_accepted < 20:
        step(dying, heard)
    assert any(0 < len(heard[number].tokens) < 40 for number in mine)
    after = load(folder, tmp_path / "after", speculation="ngram", max_num_sequences=16)
    for number in mine:
        if heard[number].end is None:
            prompt, sampling = PROMPT + PROMPT[: number % 7], dict(KINDS[number % len(KINDS)])
            sampling.pop("prompt_logprobs", None)
            submit(after, number, sampling, prompt, answer=heard[number].tokens)
    finish(after, heard)
    for number in mine:
        assert heard[number].told() == expected[number].told()
