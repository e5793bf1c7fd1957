"""The sampler on device rows: which pieces touch which rows, in which order, and that rows do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_backend.batch import Batch, NewRow, features_of
from paged_backend.request import SamplingParams
from paged_backend.runner.sampler import Sampler
from paged_backend.runner.step_plan import plan_step, shape_of
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.runner.transfers import Sampled
from paged_kernels.reference import reference

VOCAB = 40
CPU = torch.device("cpu")


def new_row(
    row: int,
    tokens: Sequence[int],
    prompt_len: int | None = None,
    seed: int = 0,
    stop_ids: Any = (),
    bad_words: Any = (),
    **options: Any,
) -> NewRow:
    length = len(tokens) if prompt_len is None else prompt_len
    sampling = SamplingParams(**options)
    features = features_of(sampling, tuple(stop_ids), tuple(bad_words))
    return NewRow(row, np.array(tokens, np.int32), length, sampling, seed, tuple(stop_ids), tuple(bad_words), features)


def batch_of(new: Sequence[NewRow], announce: bool = True) -> Batch:
    """Every row computes all its tokens and samples."""
    features = 0
    for row in new:
        features |= row.features
    lens = np.array([len(row.token_ids) for row in new], np.int32)
    return Batch(
        step=1,
        rows=np.array([row.row for row in new], np.int32),
        starts=np.zeros_like(lens),
        counts=lens,
        samples=np.ones(len(new), np.bool_),
        request_ids=np.arange(len(new)),
        new_rows=tuple(new) if announce else (),
        features=features,
    )


def sample(new: Sequence[NewRow], logits: Tensor, rows: DeviceRows | None = None) -> Sampled:
    rows = rows or DeviceRows(16, 64, 16, 2, CPU)
    batch = batch_of(new)
    plan = plan_step(batch, shape_of(batch))
    step = rows.apply(batch, plan)
    outputs = torch.from_numpy(plan.output_indices)
    sampled = Sampler(reference).sample(logits[outputs.argsort()].clone(), rows.sampling(batch, step), rows)
    return Sampled(
        *(
            None if column is None else column[outputs]
            for column in (sampled.token_ids, sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs)
        )
    )


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


VARIETY = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "warm": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6, "temperature": 0.8},
    "min_p": {"min_p": 0.2},
    "penalties": {"repetition_penalty": 1.8, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    "greedy_penalty": {"temperature": 0.0, "frequency_penalty": 2.0},
    "bias": {"logit_bias": {3: 6.0, 5: -100.0}},
    "min_tokens": {"min_tokens": 5, "stop_ids": (1, 2, 3)},
    "bad_words": {"bad_words": ((4,), (2, 9, 11))},
    "logprobs": {"logprobs": 3},
    "everything": {
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "logit_bias": {1: 2.0},
        "presence_penalty": 1.0,
        "bad_words": ((7,),),
        "logprobs": 1,
    },
}


def variety() -> list[NewRow]:
    return [
        new_row(row, [1, 5, 2, 9, row], prompt_len=2, seed=1000 + row, **options)
        for row, options in enumerate(VARIETY.values())
    ]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", VARIETY)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(name: str) -> None:
    """Drawn 50 times, on logits that differ, so that equal by chance is out of the question."""
    index = list(VARIETY).index(name)
    for draw in range(50):
        logits = logits_of(len(VARIETY), draw)
        new = [replace(row, seed=row.seed + 7 * draw) for row in variety()]
        together = sample(new, logits)
        alone = sample([new[index]], logits[index : index + 1])
        assert together.token_ids[index] == alone.token_ids[0]


def test_many_rows_in_turns_get_the_tokens_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(len(VARIETY))
    whole = sample(variety(), logits).token_ids
    monkeypatch.setattr("paged_kernels.reference_logits.SAMPLING_BYTES", 1)  # a row at a time
    assert torch.equal(sample(variety(), logits).token_ids, whole)


def test_sampled_tokens_are_appended_to_their_rows() -> None:
    rows = DeviceRows(16, 64, 16, 2, CPU)
    new = variety()
    token_ids = sample(new, logits_of(len(new)), rows).token_ids
    for row, token in zip(new, token_ids.tolist(), strict=True):
        assert rows.token_ids[row.row, :6].tolist() == [*row.token_ids.tolist(), token]


def test_temperature_zero_takes_the_largest_logit_after_bias_bans_and_penalties() -> None:
    logits = torch.arange(VOCAB).float().expand(5, -1)
    new = [
        new_row(0, [1], temperature=0.0),
        new_row(1, [1], temperature=0.0, logit_bias={39: -50.0, 7: 90.0}),
        new_row(2, [1, 39, 39], prompt_len=1, temperature=0.0, frequency_penalty=1.0),
        new_row(3, [1, 38], temperature=0.0, bad_words=((38, 39), (38,))),
        new_row(4, [1, 39], prompt_len=2, temperature=0.0, repetition_penalty=2.0),
    ]
    assert sample(new, logits).token_ids.tolist() == [39, 7, 38, 37, 38]


@pytest.mark.parametrize(
    ("num_answered", "banned"), [(0, True), (2, True), (3, False)], ids=["first", "third", "fourth"]
)
def test_stop_ids_are_banned_before_min_tokens(num_answered: int, banned: bool) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 3] = 10, 5
    tokens = [1, 2] + [4] * num_answered
    token = sample(
        [new_row(0, tokens, prompt_len=2, temperature=0.0, min_tokens=3, stop_ids=(8, 9))], logits
    ).token_ids.item()
    assert token == (3 if banned else 9)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(2)
    new = [
        new_row(0, [1], temperature=0.0, logit_bias={7: 100.0}, logprobs=2),
        new_row(1, [1], temperature=2.0, top_k=2, logprobs=0),
    ]
    out = sample(new, logits)
    expected = torch.log_softmax(logits, -1)
    assert out.token_ids[0] == 7
    assert torch.allclose(out.logprobs, expected[[0, 1], out.token_ids], atol=1e-6)
    assert out.ranks.tolist() == [
        1 + (row > row[token]).sum().item() for row, token in zip(logits, out.token_ids, strict=True)
    ]
    assert out.ranks[0] == 1 + (logits[0] > logits[0, 7]).sum() > 1, (
        "token 7 is chosen for its bias, though others are likelier"
    )
    assert torch.equal(out.top_ids, expected.topk(2).indices)
    assert torch.allclose(out.top_logprobs, expected.topk(2).values, atol=1e-6)


def test_a_new_sequence_on_a_row_inherits_nothing() -> None:
    rows = DeviceRows(16, 64, 16, 2, CPU)
    busy = {"logit_bias": dict.fromkeys(range(30), -100.0), "min_tokens": 9, "repetition_penalty": 5.0, "top_k": 2}
    sample(
        [new_row(3, range(20), prompt_len=1, seed=5, stop_ids=(30, 31), bad_words=((32,), (33,)), **busy)],
        logits_of(1),
        rows,
    )
    wide = new_row(
        4, [1], stop_ids=(1, 2), bad_words=((1,), (2,), (3,)), logit_bias=dict.fromkeys(range(40), 1.0), min_tokens=3
    )
    for options in ({}, {"bad_words": ((9,),)}, {"logit_bias": {1: 1.0}}, {"min_tokens": 2, "stop_ids": (8,)}):
        for draw in range(20):
            new = [new_row(3, [5], seed=draw, **options), wide]
            assert torch.equal(
                sample(new, logits_of(2, draw), rows).token_ids, sample(new, logits_of(2, draw)).token_ids
            )


def test_seeds_of_64_bits_differ_in_every_bit() -> None:
    logits = torch.zeros(64, 2000)
    rows = DeviceRows(64, 8, 16, 0, CPU)
    tokens = sample([new_row(row, [1], seed=1 << row) for row in range(64)], logits, rows).token_ids
    assert len(set(tokens.tolist())) > 55


def test_a_tiny_temperature_is_greedy() -> None:
    logits = logits_of(1) * 100
    assert sample([new_row(0, [1], temperature=1e-30)], logits).token_ids.item() == logits.argmax().item()


def test_draws_under_all_settings_follow_the_truncated_softmax() -> None:
    logits = torch.linspace(-2, 2, VOCAB)
    n = 6000
    rows = DeviceRows(n, 8, 16, 0, CPU)
    new = [new_row(row, [0], seed=row * 7919, temperature=1.5, top_k=12, top_p=0.8) for row in range(n)]
    counts = np.bincount(sample(new, logits.expand(n, -1), rows).token_ids.numpy(), minlength=VOCAB)
    p = torch.softmax(logits.double() / 1.5, 0)
    p[: VOCAB - 12] = 0
    p /= p.sum()
    p[[p[p > q].sum() >= 0.8 for q in p]] = 0
    expected = (p / p.sum() * n).numpy()
    kept = expected > 0
    assert not counts[~kept].any()
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 27.9  # 8 degrees of freedom, p = 0.0005
    assert kept.sum() == 9
