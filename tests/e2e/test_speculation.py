"""Steps with drafts through the real engine: whatever the drafts are, tokens, ends and log-probabilities are those of
the engine without any. A made-up proposer knows the answers, and errs as often as it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.runner.model_runner import ModelRunner
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from paged_kernels.reference_rows import RowOps
from tests.engine_answers import answers, load
from tests.oracle import random_prompts, save_checkpoint
from tests.runner_driver import load_runner

NUM_DRAFTS = 4
LENGTHS = [1, 15, 16, 40]
# several steps computed as one may round differently; a wrong position or context changes far more
LOGPROB_TOLERANCE = 1e-4
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 3},
    "truncated": {"seed": 4, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "seeded penalties": {"seed": 5, "repetition_penalty": 1.1, "frequency_penalty": 0.3, "top_p": 0.95},
    "bias and bans": {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 9, "bad_words": ((5, 5),)},
    "logprobs": {"seed": 6, "logprobs": 2},
    "allowed tokens": {"seed": 7, "allowed_token_ids": tuple(range(3, 40))},
}


class Knowing:
    """Proposes what comes next in texts that it knows, wrong now and then."""

    def __init__(self, quality: float) -> None:
        self.texts: list[list[int]] = []
        self._quality = quality
        self._random = np.random.default_rng(0)

    def __call__(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            length = int(lengths[row])
            known = token_ids[row, :length].tolist()
            text = next((text for text in self.texts if text[:length] == known), [])
            drafts = (text[length : length + count] + [7] * count)[:count]
            wrong = self._random.random(count) >= self._quality
            drafts = [max(draft - 1, 0) if miss else draft for draft, miss in zip(drafts, wrong, strict=True)]
            token_ids[row, length : length + count] = torch.tensor(drafts, dtype=torch.int32)


class Drafting:
    """Engines of one runner, with drafts or without."""

    def __init__(self, runner: ModelRunner, propose: Knowing) -> None:
        self.runner, self.propose = runner, propose

    def ask(
        self,
        prompts: Sequence[np.ndarray],
        num_drafts: int,
        steps_ahead: int = 0,
        num_pages: int | None = None,
        **sampling: object,
    ) -> list[Answer]:
        limits = self.runner.limits
        scheduler = Scheduler(
            SchedulerLimits(
                page_size=limits.page_size,
                num_pages=num_pages or limits.num_pages,
                max_model_len=80,
                max_num_sequences=8,
                max_batched_tokens=256,
                num_drafts=num_drafts,
            )
        )
        bounds = TableBounds(8, limits.num_pages, limits.page_size, 80, 256)
        engine = Engine(scheduler, CheckedRunner(self.runner, bounds, scheduler.check), steps_ahead)
        params = dict(sampling)
        bad_words = params.pop("bad_words", ())
        allowed_ids = params.get("allowed_token_ids")
        allowed = None if allowed_ids is None else _mask(allowed_ids, limits.vocab_size)
        found = [Answer() for _ in prompts]
        for request_id, prompt in enumerate(prompts):
            request = SamplingParams(**({"max_tokens": 26, "ignore_eos": True} | params))  # type: ignore[arg-type]
            engine.submit(Submit(request_id, prompt.tobytes(), request, bad_words, "", 1e18, allowed=allowed))  # type: ignore[arg-type]
        while not engine.idle:
            for output in engine.step():
                for entry, request_id in enumerate(output.request_ids.tolist()):
                    found[request_id].tokens.append(int(output.token_ids[entry]))
                    if output.logprobs is not None:
                        tops = output.top_logprobs[entry].values()
                        found[request_id].logprobs += [float(output.logprobs[entry]), *tops]
                for finish in output.finishes:
                    assert finish.error is None, finish.message
                    found[finish.request_id].reason = finish.reason
        for _ in self.runner.finished(0):  # what nobody waits for any more
            pass
        self.num_steps, self.num_preemptions = engine.num_steps, scheduler.num_preemptions
        self.num_proposed, self.num_accepted = scheduler.speculation.num_proposed, scheduler.speculation.num_accepted
        return found


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""


def _mask(token_ids: object, vocab_size: int) -> bytes:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1  # type: ignore[call-overload]
    return np.packbits(bits, bitorder="little").tobytes()


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.reason for one in found] == [one.reason for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=LOGPROB_TOLERANCE)


@pytest.fixture(scope="module", params=[(1, 0.7), (16, 0.7), (16, 0.0), (16, 1.0)], ids=str)
def kind(request: pytest.FixtureRequest) -> tuple[int, float]:
    """Tokens of a page; the share of right drafts."""
    found: tuple[int, float] = request.param
    return found


@pytest.fixture(scope="module")
def page_size(kind: tuple[int, float]) -> int:
    return kind[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "Qwen3ForCausalLM", head_dim=32)


@pytest.fixture(scope="module")
def runner(checkpoint: Path, page_size: int) -> ModelRunner:
    return load_runner(checkpoint, page_size=page_size, num_pages=640 // page_size, max_num_sequences=8)


@pytest.fixture(scope="module")
def plain(runner: ModelRunner) -> Drafting:
    return Drafting(runner, Knowing(0.0))


@pytest.fixture(scope="module")
def drafting(checkpoint: Path, kind: tuple[int, float]) -> Drafting:
    page_size, quality = kind
    runner = load_runner(checkpoint, page_size=page_size, num_pages=640 // page_size, max_num_sequences=8)
    propose = Knowing(quality)
    runner._rows.speculate(propose, NUM_DRAFTS)
    return Drafting(runner, propose)


def texts_of(prompts: Sequence[np.ndarray], found: list[Answer]) -> list[list[int]]:
    return [[*prompt.tolist(), *answer.tokens] for prompt, answer in zip(prompts, found, strict=True)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_no_token_depends_on_drafts(plain: Drafting, drafting: Drafting, sampling: dict[str, object]) -> None:
    prompts = random_prompts(LENGTHS)
    expected = plain.ask(prompts, 0, **sampling)
    drafting.propose.texts = texts_of(prompts, expected)
    for steps_ahead in (0, 1):
        assert_same(drafting.ask(prompts, NUM_DRAFTS, steps_ahead, **sampling), expected)
        quality = drafting.propose._quality
        share = drafting.num_accepted / drafting.num_proposed
        assert share < 0.1 if quality == 0.0 else share > 0.15  # a wrong draft may be right by chance
        if quality == 1.0:
            assert drafting.num_accepted == drafting.num_proposed and drafting.num_steps < plain.num_steps / 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sampling", [SAMPLINGS["greedy"], SAMPLINGS["seeded penalties"]], ids=["greedy", "seeded"])
def test_no_token_depends_on_drafts_when_sequences_are_preempted(
    plain: Drafting, drafting: Drafting, page_size: int, sampling: dict[str, object]
) -> None:
    prompts = random_prompts(LENGTHS)
    expected = plain.ask(prompts, 0, **sampling)
    drafting.propose.texts = texts_of(prompts, expected)
    for steps_ahead in (0, 1):
        found = drafting.ask(prompts, NUM_DRAFTS, steps_ahead, num_pages=96 // page_size, **sampling)
        assert drafting.num_preemptions > 0 or page_size > 1  # what large pages have no room for does not start
        assert_same(found, expected)


def test_a_stop_token_inside_a_run_ends_it(plain: Drafting, drafting: Drafting) -> None:
    prompts = random_prompts(LENGTHS)
    free = plain.ask(prompts, 0, temperature=0.0)
    drafting.propose.texts = texts_of(prompts, free)
    for place in (3, 12):
        stops = tuple(sorted({answer.tokens[place] for answer in free}))
        expected = plain.ask(prompts, 0, temperature=0.0, stop_token_ids=stops)
        assert {answer.reason for answer in expected} == {"stop"}
        assert_same(drafting.ask(prompts, NUM_DRAFTS, 1, temperature=0.0, stop_token_ids=stops), expected)


@pytest.mark.parametrize("speculation", ["ngram", "auto"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3, "temperature": 0.4}], ids=["greedy", "seeded"])
def test_guesses_from_the_text_change_no_token(
    checkpoint: Path, tmp_path: Path, speculation: str, sampling: dict[str, object]
) -> None:
    prompts = [np.concatenate([prompt, prompt[:7], prompt[:5]]) for prompt in random_prompts(LENGTHS)]
    options = {"max_num_sequences": 8, "num_pages": 64, "page_size": 16, "max_model_len": 256}
    asked = {"max_tokens": 60, "ignore_eos": True, "frequency_penalty": -1.0} | sampling
    expected = answers(load(checkpoint, tmp_path, **(options | {"speculation": "off"})), prompts, **asked)
    engine = load(checkpoint, tmp_path, speculation=speculation, num_speculative_tokens=5, debug_checks=True, **options)
    assert answers(engine, prompts, **asked) == expected
    stats = engine.stats()
    if speculation == "ngram":  # whether drafts pay depends on the machine
        assert stats.drafts_accepted > 0
        assert stats.drafts_proposed > stats.drafts_accepted or sampling["temperature"] == 0
    assert answers(engine, prompts, speculation="off", **asked) == expected
    assert engine.stats().drafts_proposed == stats.drafts_proposed, "a request that wants no drafts had some"


def test_a_step_without_drafts_is_checked_for_none(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing repeats, an engine that may guess does what one does that may not."""
    asked = {"max_tokens": 30, "ignore_eos": True, "frequency_penalty": 2.0, "repetition_penalty": 100.0}
    options = {"max_num_sequences": 8, "num_pages": 64, "page_size": 16, "max_model_len": 256}
    prompts = [np.arange(3 + 40 * number, 20 + 40 * number, dtype=np.int32) for number in range(3)]
    expected = answers(load(checkpoint, tmp_path, **(options | {"speculation": "off"})), prompts, **asked)
    engine = load(checkpoint, tmp_path, speculation="ngram", **options)
    monkeypatch.setattr(RowOps, "accept_tokens", None)
    assert answers(engine, prompts, **asked) == expected and engine.stats().drafts_proposed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["captured", "launched"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"seed": 3, "temperature": 0.4, "frequency_penalty": -1.0}],
    ids=["tokens chosen in a graph", "tokens chosen beside it"],
)
def test_on_a_gpu_tokens_are_those_of_the_cpu_without_guesses(
    checkpoint: Path, tmp_path: Path, sampling: dict[str, object], cuda_graphs: bool
) -> None:
    prompts = [np.concatenate([prompt, prompt[:7], prompt[:5]]) for prompt in random_prompts(LENGTHS)]
    options = {"max_num_sequences": 8, "num_pages": 64, "page_size": 16, "max_model_len": 256, "dtype": "float32"}
    asked = {"max_tokens": 60, "ignore_eos": True} | sampling
    expected = answers(load(checkpoint, tmp_path, **(options | {"speculation": "off"})), prompts, **asked)
    guessing = {"speculation": "ngram", "num_speculative_tokens": 5, "device": "cuda", "cuda_graphs": cuda_graphs}
    engine = load(checkpoint, tmp_path, **guessing, **options)
    assert answers(engine, prompts, **asked) == expected
    stats = engine.stats()
    assert stats.drafts_proposed > stats.drafts_accepted > 0
