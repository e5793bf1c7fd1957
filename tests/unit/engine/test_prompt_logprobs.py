"""prompt_logprobs: those of transformers, however the prompt is cut up, cached or interrupted; and how they reach a
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.prompt_logprobs import PromptTable, PromptTableParts
from paged_backend.frontend.streamer import by_sequence
from paged_backend.messages import PromptLogprobs, Submit
from paged_backend.request import MAX_LOGPROBS, SamplingParams, parse_sampling
from paged_backend.runner.sampler import prompt_tokens_at_once
from tests.oracle import Oracle, random_prompts, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "Qwen3ForCausalLM", head_dim=16)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@dataclass
class Heard:
    token_ids: list[int] = field(default_factory=list)
    pieces: list[PromptLogprobs] = field(default_factory=list)
    num_cached_tokens: int = -1
    pieces_after_the_first_token: int = 0

    def table(self, prompt: np.ndarray, n: int) -> PromptTable:
        parts = PromptTableParts(prompt, n)
        for piece in self.pieces:
            parts.add(piece.start, piece.logprobs, piece.ranks, piece.top_ids, piece.top_logprobs)
        table = parts.whole()
        assert table is not None
        return table


def load(folder: Path, tmp_path: Path, **options: object) -> Engine:
    engine, *_ = load_engine(
        EngineConfig.parse(
            {
                "model": str(folder),
                "device": "cpu",
                "speculation": "off",
                "num_pages": 256,
                "max_num_sequences": 16,
                **options,
            }
        ),
        tmp_path,
    )
    return engine


def submit(
    engine: Engine, request_id: int, prompt: np.ndarray, prompt_logprobs: int | None, **sampling: object
) -> None:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 3, "prompt_logprobs": prompt_logprobs} | sampling))  # type: ignore[arg-type]
    engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))


def drain(engine: Engine) -> dict[int, Heard]:
    heard: dict[int, Heard] = {}
    while not engine.idle:
        for output in engine.step():
            for piece in output.feature_outputs:
                mine = heard.setdefault(piece.request_id, Heard())
                mine.pieces.append(piece)
                mine.pieces_after_the_first_token += bool(mine.token_ids)
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                heard.setdefault(request_id, Heard()).token_ids.append(token)
            for request_id, num_cached in output.started.items():
                heard[request_id].num_cached_tokens = num_cached
        engine.check()
    return heard


def ask(
    engine: Engine, prompts: Sequence[np.ndarray], prompt_logprobs: int | None = 4, **sampling: object
) -> dict[int, Heard]:
    for request_id, prompt in enumerate(prompts):
        submit(engine, request_id, prompt, prompt_logprobs, **sampling)
    return drain(engine)


def check(oracle: Oracle, prompt: np.ndarray, heard: Heard, n: int) -> None:
    truth = torch.log_softmax(oracle.logits(prompt), -1)[:-1]
    own = truth[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:].astype(np.int64))]
    table = heard.table(prompt, n)
    assert heard.pieces_after_the_first_token == 0
    np.testing.assert_allclose(table.logprobs, own.numpy(), atol=1e-4)
    np.testing.assert_allclose(table.top_logprobs, truth.topk(n).values.numpy(), atol=1e-4)
    if len(prompt) > 1:
        assert (table.ranks == (truth > own[:, None]).sum(-1).numpy() + 1).mean() > 0.95  # near ties may change places
        assert (table.top_ids == truth.topk(n).indices.numpy()).mean() > 0.95 if n else True


@pytest.mark.one_in(2)
@pytest.mark.parametrize("budget", [7, 4096])
@pytest.mark.parametrize("page_size", [1, 16])
def test_they_equal_transformers_and_so_do_the_tokens_also_with_pages_in_the_cache(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, budget: int
) -> None:
    prompts = random_prompts((1, 2, 16, 17, 33, 100))
    prompts.append(np.concatenate([prompts[-1][:64], prompts[2]]))
    expected = oracle.greedy(prompts, 3)
    engine = load(folder, tmp_path, page_size=page_size, num_pages=1024 // page_size, max_batched_tokens=budget)
    for _ in range(2):
        heard = ask(engine, prompts)
        for request_id, prompt in enumerate(prompts):
            check(oracle, prompt, heard[request_id], 4)
            assert heard[request_id].token_ids == expected[request_id]
            assert heard[request_id].num_cached_tokens == 0  # all of it is computed
    others = ask(engine, prompts, None)
    assert others[5].num_cached_tokens >= 96, "its pages can be found by others"
    assert not any(heard.pieces for heard in others.values())


@pytest.mark.parametrize("n", [0, 1, MAX_LOGPROBS])
def test_each_request_is_told_of_as_many_tokens_as_it_asked_for_beside_others(
    folder: Path, oracle: Oracle, tmp_path: Path, n: int
) -> None:
    prompts = random_prompts((20, 31, 9, 40))
    engine = load(folder, tmp_path, max_batched_tokens=16)
    for request_id, (prompt, wanted) in enumerate(zip(prompts, (n, None, 5, 0), strict=True)):
        submit(engine, request_id, prompt, wanted, logprobs=2)
    heard = drain(engine)
    for request_id, wanted in ((0, n), (2, 5), (3, 0)):
        check(oracle, prompts[request_id], heard[request_id], wanted)
        assert heard[request_id].table(prompts[request_id], wanted).top_ids.shape == (
            len(prompts[request_id]) - 1,
            wanted,
        )
    assert not heard[1].pieces
    assert [heard[request_id].token_ids for request_id in range(4)] == oracle.greedy(prompts, 3)


def test_a_preempted_prompt_is_told_once_and_right(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    """The older request's answer outgrows the pool while the younger ones' prompts are read in chunks."""
    prompts = random_prompts((40, 150, 140))
    engine = load(folder, tmp_path, num_pages=20, max_model_len=200, max_batched_tokens=4, speculation="off")
    submit(engine, 0, prompts[0], None, max_tokens=60)
    submit(engine, 1, prompts[1], 3)
    submit(engine, 2, prompts[2], 3)
    seen = 0
    heard: dict[int, Heard] = {}
    while not engine.idle:
        for output in engine.step():
            for piece in output.feature_outputs:
                heard.setdefault(piece.request_id, Heard()).pieces.append(piece)
        engine.check()
        # in the middle of a prompt: the pool is taken away from all but the oldest
        if seen == 0 and engine.num_steps == 40:
            victim = max(engine._scheduler._running.runners, key=lambda sequence: sequence.spec.arrival_index)
            (feature,) = engine._scheduler._features.of(victim)
            assert 0 < feature.num_reusable(victim) < victim.spec.prompt_len - 1
            engine._scheduler._living.preempt(victim)
            seen = 1
    assert engine.stats().num_preemptions > 0
    for request_id in (1, 2):
        check(oracle, prompts[request_id], heard[request_id], 3)
        positions = [
            position
            for piece in heard[request_id].pieces
            for position in range(piece.start, piece.start + len(piece.logprobs) // 4)
        ]
        assert positions == list(range(1, len(prompts[request_id])))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_request_that_left_is_told_nothing_and_the_others_all(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompts = random_prompts((60, 61))
    engine = load(folder, tmp_path, max_batched_tokens=16)
    engine._steps_ahead = steps_ahead
    for request_id, prompt in enumerate(prompts):
        submit(engine, request_id, prompt, 2)
    first = [piece for _ in range(3) for output in engine.step() for piece in output.feature_outputs]
    assert first
    engine.abort(0)
    heard = drain(engine)
    assert list(heard) == [1]
    check(oracle, prompts[1], heard[1], 2)


def test_few_logits_are_in_memory_at_once(
    folder: Path, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompts([300])[0]
    engine = load(folder, tmp_path, max_num_sequences=20)
    decoder = engine._runner._decoder
    rows = []
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda x, out=None: (rows.append(len(x)), logits(x, out))[1])
    check(oracle, prompt, ask(engine, [prompt])[0], 4)
    assert max(rows) == 20
    for num_rows, vocab_size in ((256, 128_256), (1, 151_936), (4096, 32_000)):
        at_once = prompt_tokens_at_once(num_rows, vocab_size)
        assert at_once == 16 or (at_once <= num_rows and at_once * vocab_size * 64 <= 512 * 2**20)


def test_steps_without_a_prompt_that_asks_have_no_span(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path)
    sent = []
    launch = engine._runner.launch
    engine._runner.launch = lambda batch: (sent.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    ask(engine, random_prompts([20]), 1, max_tokens=5)
    assert [[len(ask.spans) for ask in batch.asks] for batch in sent] == [[1], [], [], [], []]
    assert {batch.features for batch in sent[1:]} == {0}  # what captured steps are looked up by


def test_a_request_that_goes_on_in_another_engine_is_not_told_again(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path)
    prompt = random_prompts([30])[0]
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1)
    engine.submit(Submit(0, prompt.tobytes(), params, (), "", 1e18, num_answered=2))
    heard = drain(engine)
    assert not heard[0].pieces and len(heard[0].token_ids) == 2


# ---- on the way to the caller


def piece(start: int, *logprobs: float) -> PromptLogprobs:
    count = len(logprobs)
    values, ids = np.array(logprobs, np.float32), np.arange(start, start + count, dtype=np.int32)
    return PromptLogprobs(
        7, start, values.tobytes(), np.full(count, 2, np.int32).tobytes(), ids.tobytes(), (values + 1).tobytes()
    )


def test_pieces_that_come_twice_count_once() -> None:
    """An engine died between them, and the next one began again."""
    parts = PromptTableParts(np.array([5, 6, 7, 8, 9], np.int32), 1)
    assert parts.whole() is None
    for one in (piece(1, -1, -2), piece(1, -1), piece(2, -2, -3), piece(4, -4)):
        assert parts.whole() is None
        parts.add(one.start, one.logprobs, one.ranks, one.top_ids, one.top_logprobs)
    table = parts.whole()
    assert table is not None
    assert list(table.entries()) == [
        None,
        {6: (-1, 2), 1: (0, 1)},
        {7: (-2, 2), 2: (-1, 1)},
        {8: (-3, 2), 3: (-2, 1)},
        {9: (-4, 2), 4: (-3, 1)},
    ]


def test_a_prompt_of_one_token_has_one_null() -> None:
    table = PromptTableParts(np.array([5], np.int32), 3).whole()
    assert table is not None and list(table.entries()) == [None]


def test_joined_deltas_keep_the_table() -> None:
    table = PromptTableParts(np.array([5], np.int32), 0).whole()
    first, second = by_sequence([Delta(prompt=table), Delta(text="a"), Delta(index=1, text="b")])
    assert first.prompt is table and second.prompt is None


def test_counts_are_checked() -> None:
    assert parse_sampling({"prompt_logprobs": "3"}).prompt_logprobs == 3
    for wrong in (-1, MAX_LOGPROBS + 1):
        with pytest.raises(RequestError, match="prompt_logprobs: expected"):
            parse_sampling({"prompt_logprobs": wrong})
