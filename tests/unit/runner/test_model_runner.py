"""The runner as the engine uses it: steps in flight, rows that come and go, shared pages, logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.batch import Batch, NewRow, features_of
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.architecture import read_architecture
from paged_backend.request import SamplingParams
from paged_backend.runner import placement
from paged_backend.runner.builder import build_runner
from paged_backend.runner.model_runner import ModelRunner
from paged_kernels.device_traits import DeviceTraits, traits_of
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import GREEDY, Driver, load_runner

LENGTHS = (3, 16, 40, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "Qwen3ForCausalLM", head_dim=16)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def step(
    rows: list[tuple[int, int, int, bool]], new_rows: tuple[NewRow, ...] = (), pages: Any = (), number: int = 1
) -> Batch:
    """rows: (row, start, count, samples); pages: (row, index, page)."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    features = 0
    for new in new_rows:
        features |= features_of(new.sampling, new.stop_ids, new.bad_words)
    return Batch(
        step=number,
        rows=columns[0].astype(np.int32),
        starts=columns[1].astype(np.int32),
        counts=columns[2].astype(np.int32),
        samples=columns[3].astype(np.bool_),
        request_ids=columns[0].astype(np.int64),
        new_rows=new_rows,
        page_updates=np.array(pages, np.int32).reshape(-1, 3),
        features=features,
    )


def tokens_of(runner: ModelRunner, batch: Batch) -> list[int]:
    runner.launch(batch)
    ((_, result),) = runner.finished(0)
    return result.token_ids.tolist()


@pytest.mark.parametrize("steps_ahead", [1, 3])
def test_steps_launched_before_results_are_read_give_the_same_tokens(
    folder: Path, oracle: Oracle, steps_ahead: int
) -> None:
    prompts = random_prompts(LENGTHS)
    assert Driver(load_runner(folder)).generate(
        prompts, 10, steps_ahead=steps_ahead, chunk=8, arrive_every=3
    ) == oracle.greedy(prompts, 10)


def test_results_come_back_in_order_until_as_many_as_asked_are_in_flight(folder: Path) -> None:
    runner = load_runner(folder)
    new = NewRow(0, random_prompts([5])[0], 5, GREEDY, 0, (), ())
    runner.launch(step([(0, 0, 5, True)], (new,), [(0, 0, 3)], number=1))
    for number in (2, 3, 4):
        runner.launch(step([(0, 3 + number, 1, True)], number=number))
    assert runner.num_in_flight == 4
    assert [batch.step for batch, _ in runner.finished(2)] == [1, 2]
    assert runner.num_in_flight == 2
    assert [batch.step for batch, _ in runner.finished(2)] == []
    assert [batch.step for batch, _ in runner.finished(0)] == [3, 4]


@pytest.mark.parametrize("logprobs", [None, 0, 2], ids=lambda n: f"logprobs-{n}")
def test_a_step_that_samples_nothing_has_an_empty_result(folder: Path, logprobs: int | None) -> None:
    runner = load_runner(folder)
    sampling = SamplingParams(temperature=0.5, top_k=3, logprobs=logprobs, logit_bias={1: 2.0}, presence_penalty=1.0)
    runner.launch(step([(0, 0, 4, False)], (NewRow(0, random_prompts([9])[0], 9, sampling, 0, (), ()),), [(0, 0, 3)]))
    ((_, result),) = runner.finished(0)
    assert result.token_ids.shape == (0,)
    assert result.token_ids.dtype == np.int32
    assert result.logprobs is None if logprobs is None else result.logprobs.shape == (0,)
    assert result.top_ids is None if not logprobs else result.top_ids.shape == (0, 2)


def test_samples_are_in_the_batchs_order_though_prefills_are_computed_last(folder: Path, oracle: Oracle) -> None:
    runner = load_runner(folder)
    prompts = random_prompts((12, 1, 30))
    new = tuple(
        NewRow(row, prompt, len(prompt), GREEDY, 0, (), ()) for row, prompt in zip((7, 2, 5), prompts, strict=True)
    )
    pages = [(7, 0, 9), (2, 0, 4), (5, 0, 0), (5, 1, 6)]
    answers = oracle.greedy(prompts, 2)
    assert tokens_of(runner, step([(7, 0, 12, True), (2, 0, 1, True), (5, 0, 29, False)], new, pages)) == [
        answers[0][0],
        answers[1][0],
    ]
    assert tokens_of(runner, step([(5, 29, 1, True), (7, 12, 1, True)])) == [answers[2][0], answers[0][1]]


def test_a_sequence_goes_on_after_preemption_as_if_nothing_had_happened(folder: Path) -> None:
    """Seeded, with penalties that count the answer: the prompt's length must survive."""
    prompt = random_prompts([20])[0]
    sampling = SamplingParams(
        temperature=0.9, top_p=0.95, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2
    )
    (answer,) = Driver(load_runner(folder)).generate([prompt], 16, sampling, seeds=[99])
    runner = load_runner(folder)
    known = np.concatenate([prompt, np.array(answer[:9], np.int32)])
    pages = [(4, 0, 8), (4, 1, 1), (4, 2, 5)]
    runner.launch(step([(4, 0, 29, True)], (NewRow(4, known, 20, sampling, 99, (), ()),), pages))
    again = [result.token_ids.item() for _, result in runner.finished(0)]
    features = features_of(sampling, (), ())
    for at in range(29, 35):
        batch = step([(4, at, 1, True)])
        runner.launch(
            Batch(
                batch.step, batch.rows, batch.starts, batch.counts, batch.samples, batch.request_ids, features=features
            )
        )
        again += [result.token_ids.item() for _, result in runner.finished(0)]
    assert again == answer[9:]


def test_a_sequence_that_starts_on_shared_pages_gets_the_tokens_of_a_whole_prefill(
    folder: Path, oracle: Oracle
) -> None:
    runner = load_runner(folder)
    first, tail = random_prompts((32, 9))
    second = np.concatenate([first, tail])
    answers = oracle.greedy([first, second], 1)
    new = NewRow(0, first, 32, GREEDY, 0, (), ())
    assert tokens_of(runner, step([(0, 0, 32, True)], (new,), [(0, 0, 6), (0, 1, 2)])) == answers[0]
    sharing = NewRow(1, second, 41, GREEDY, 0, (), ())
    assert tokens_of(runner, step([(1, 32, 9, True)], (sharing,), [(1, 0, 6), (1, 1, 2), (1, 2, 7)])) == answers[1]


def test_a_seeded_sequence_gets_the_same_tokens_alone_and_among_others(folder: Path) -> None:
    prompts = random_prompts((12, 30, 5, 18, 44))
    mine = SamplingParams(temperature=1.0, top_p=0.9)
    others = [
        SamplingParams(temperature=1.4),
        GREEDY,
        SamplingParams(top_k=3, logprobs=2),
        SamplingParams(min_p=0.1, logit_bias={4: 3.0}, logprobs=0),
    ]
    (alone,) = Driver(load_runner(folder)).generate(prompts[:1], 25, mine, seeds=[2**63 + 5])
    among = Driver(load_runner(folder), seed=8).generate(
        prompts, 25, [mine, *others], seeds=[2**63 + 5, 1, 2, 3, 4], chunk=6, arrive_every=2
    )
    assert among[0] == alone
    (reseeded,) = Driver(load_runner(folder)).generate(prompts[:1], 25, mine, seeds=[6])
    assert reseeded != alone


def test_logprobs_equal_transformers(folder: Path, oracle: Oracle) -> None:
    prompt = random_prompts([21])[0]
    driver = Driver(load_runner(folder))
    (answer,) = driver.generate([prompt], 5, SamplingParams(temperature=0.0, logprobs=4))
    truth = torch.log_softmax(oracle.logits([*prompt.tolist(), *answer]), -1)[20:-1]
    for (_, result), token, expected in zip(driver.results, answer, truth, strict=True):
        assert result.logprobs[0] == pytest.approx(expected[token].item(), abs=1e-4)
        assert result.top_ids[0].tolist() == expected.topk(4).indices.tolist()
        assert np.allclose(result.top_logprobs[0], expected.topk(4).values.numpy(), atol=1e-4)
        assert result.ranks.tolist() == [1]


def test_limits_are_those_of_checkpoint_and_pool(folder: Path) -> None:
    limits = load_runner(folder, num_pages=20, page_size=8).limits
    assert (limits.max_model_len, limits.num_pages, limits.page_size, limits.vocab_size) == (160, 20, 8, 199)


def test_a_sequence_can_be_as_long_as_max_model_len(folder: Path, oracle: Oracle) -> None:
    prompt = random_prompts([10])
    runner = load_runner(folder, num_pages=3, page_size=8, max_model_len=23)
    assert Driver(runner).generate(prompt, 13) == oracle.greedy(prompt, 13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_near_float32(folder: Path, oracle: Oracle, dtype: str) -> None:
    """Types of weights and KV alike: the logprob of the first token is within what 3 layers of bfloat16 rounding can
    do.
    """
    prompt = random_prompts([30])[0]
    driver = Driver(load_runner(folder, dtype=dtype))
    ((token,),) = driver.generate([prompt], 1, SamplingParams(temperature=0.0, logprobs=0))
    ((_, result),) = driver.results
    truth = torch.log_softmax(oracle.logits(prompt), -1)[-1, token].item()
    assert result.logprobs[0] == pytest.approx(truth, abs=0.5)


def test_every_decision_is_told(folder: Path) -> None:
    told: list[str] = []
    build_runner(EngineConfig(model=str(folder), device="cpu", num_pages=20), told.append)
    about = ("Qwen3ForCausalLM", "weights", "max_num_sequences", "num_pages")
    assert [word in sentence for word, sentence in zip(about, told, strict=True)] == [True] * 4


def test_a_gpu_that_cannot_convert_8_bits_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traits = {"cuda": DeviceTraits(True, (8, 6), 72), "cpu": traits_of(torch.device("cpu"))}
    monkeypatch.setattr(placement, "traits_of", lambda device: traits[device.type])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A10")
    architecture = read_architecture(folder)
    with pytest.raises(
        EngineError, match=r"kv_dtype: fp8_e4m3 needs a GPU of compute capability 8\.9; an A10 has less"
    ):
        placement._dtypes(EngineConfig(kv_dtype="fp8_e4m3"), architecture, torch.device("cuda"))
    assert (
        placement._dtypes(EngineConfig(kv_dtype="fp8_e4m3"), architecture, torch.device("cpu"))[1]
        == torch.float8_e4m3fn
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        load_runner(folder, device="cuda:1")
