"""Sampling against its specification in plain torch, and the cuts of truncation against float64 sums. On the CPU: 200
tokens in chunks of 64, interpreted.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from paged_kernels import reference_rows
from paged_kernels.logit_edits import add_bias, apply_penalties
from paged_kernels.reference import reference
from paged_kernels.sampling import (
    MAX_TOP,
    _row_key,
    _token_hash,
    argmax,
    logprobs,
    make_sampling_workspace,
    sample,
)
from paged_kernels.top_logprobs import top_logprobs
from paged_kernels.truncation import truncation_thresholds
from tests.kernels.sampling_cases import DEVICE, LARGE_VOCAB, VOCAB, floats, gpu, ints, large, randn, small

# ---- argmax, log-probabilities


def test_argmax_takes_the_smallest_of_equals_and_leaves_no_trace() -> None:
    logits, workspace = randn(5, VOCAB), small()
    logits[0, 64] = logits[0, 190] = logits[0, 65] = 9.0
    logits[1, 199] = 9.0
    logits[2, :] = -torch.inf
    logits[2, 150] = -5.0
    logits[3, :] = 1.0
    logits[4, :] = -torch.inf
    assert argmax(logits, workspace=workspace).tolist() == [64, 199, 150, 0, 0]
    assert not workspace.arrivals.any(), "an arrival counter was left set"
    out = torch.full((2,), -7, dtype=torch.int32, device=DEVICE)
    assert argmax(logits[:2], workspace=workspace, out=out) is out
    assert out.tolist() == [64, 199]


@pytest.mark.parametrize(
    ("vocab_size", "chunk"),
    [pytest.param(size, 4096, marks=pytest.mark.gpu) for size in (32000, 32773, 50257, 128256, 151936)],
)  # the interpreter refuses to reduce NaN
def test_rows_of_nan_are_answered_with_tokens_of_the_vocabulary(vocab_size: int, chunk: int) -> None:
    """An overflow somewhere must not become an id that the next step looks up behind the embedding's end."""
    logits, workspace = randn(6, vocab_size), small(6, vocab_size, chunk)
    logits[0] = torch.nan
    logits[1, vocab_size // 2 :] = torch.nan
    logits[2, :-1] = torch.nan
    logits[3, -1] = torch.nan
    logits[4] = -torch.nan
    logits[5] = -torch.inf
    seeds, positions = ints(*range(6), dtype=torch.int64), ints(*range(6))
    answers = [
        argmax(logits, workspace=workspace),
        sample(logits, floats(*[0.7] * 6), seeds, positions, workspace=workspace),
        top_logprobs(logits, 5, workspace=workspace)[0],
    ]
    for tokens in answers:
        assert ((tokens >= 0) & (tokens < vocab_size)).all(), tokens
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_probabilities_equal_log_softmax(dtype: torch.dtype) -> None:
    logits, workspace = randn(4, VOCAB, scale=4).to(dtype), small()
    logits[1, 64:128] = -torch.inf  # a whole chunk
    expected = logits.double().log_softmax(-1)
    ids = ints(0, 5, 199, 63)
    torch.testing.assert_close(
        logprobs(logits, ids, workspace=workspace).double(),
        expected.gather(1, ids.long()[:, None])[:, 0],
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(
        logprobs(logits.float(), ids, workspace=workspace),
        reference.logprobs(logits.float(), ids.long()),
        rtol=0,
        atol=1e-5,
    )
    tokens = argmax(logits, workspace=workspace)
    torch.testing.assert_close(
        logprobs(logits, tokens, workspace=workspace).double(), expected.amax(-1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("n", [1, 3, MAX_TOP])
def test_top_log_probabilities_equal_the_reference_and_ties_come_in_order(n: int) -> None:
    logits, workspace = randn(3, VOCAB, scale=4), small()
    ids, values = top_logprobs(logits, n, workspace=workspace)
    expected_ids, expected = reference.top_logprobs(logits, n)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    tied = torch.zeros(1, VOCAB, device=DEVICE)
    tied[0, :60] = -1.0
    assert top_logprobs(tied, n, workspace=workspace)[0].tolist() == [list(range(60, 60 + n))]
    assert not workspace.arrivals.any()


def test_more_top_log_probabilities_than_a_chunk_has_tokens() -> None:
    logits = randn(2, 70)
    workspace = small(vocab_size=70, chunk=64)
    assert torch.equal(top_logprobs(logits, 20, workspace=workspace)[0], logits.topk(20).indices)
    workspace = small(vocab_size=70, chunk=16)
    assert torch.equal(top_logprobs(logits, 20, workspace=workspace)[0], logits.topk(20).indices)


# ---- drawing


@triton.jit
def _hash_kernel(seeds, positions, hashes, VOCAB: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, PAD)
    hashed = _token_hash(_row_key(tl.load(seeds + row), tl.load(positions + row)), token)
    tl.store(hashes + row * VOCAB + token, hashed.to(tl.int64), mask=token < VOCAB)


def python_hash(seed: int, position: int, token: int) -> int:
    """As reference.sample's docstring has it, in Python's integers."""

    def fmix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    key = z ^ z >> 31
    return fmix32(fmix32((token * 0x9E3779B1 + key) % 2**32) ^ key >> 32)


def test_the_hash_is_the_specified_one_bit_for_bit() -> None:
    seeds, positions, count = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF], [0, 1, 2**31 - 1, 77, 0, 131071], 40
    hashes = torch.zeros(6, count, dtype=torch.int64, device=DEVICE)
    _hash_kernel[(6,)](ints(*seeds, dtype=torch.int64), ints(*positions), hashes, VOCAB=count, PAD=64)
    assert hashes.tolist() == [
        [python_hash(seed, position, token) for token in range(count)]
        for seed, position in zip(seeds, positions, strict=True)
    ]


def draws(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand(rows, generator=generator) * 2 + 0.05
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**31 - 1, (rows,), generator=generator)
    return temperature.to(DEVICE), seeds.to(DEVICE), positions.to(DEVICE)


def drawn(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    return reference.sample(reference.apply_temperature(logits, temperature), seeds, positions)


def race(logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 scores of reference.sample."""
    key = reference_rows._splitmix64(seeds, positions)
    low, high = (key & 0xFFFFFFFF)[:, None], (key >> 32 & 0xFFFFFFFF)[:, None]
    hashed = torch.arange(logits.shape[1], device=DEVICE) * 0x9E3779B1 + low & 0xFFFFFFFF
    uniform = (
        ((reference_rows._fmix32(reference_rows._fmix32(hashed) ^ high).float() + 0.5) * 2.0**-32)
        .clamp(max=1 - 2.0**-24)
        .double()
    )
    return logits.double() / temperature.double()[:, None] - torch.log(-torch.log1p(-uniform))


def assert_won(tokens: torch.Tensor, scores: torch.Tensor) -> None:
    """The kernel's logarithms are good to 1e-5, so a token may win that is no further behind."""
    behind = scores.amax(-1) - scores.gather(1, tokens[:, None])[:, 0]
    assert behind.max() <= 3e-5, f"a token won that is {behind.max():.1e} behind"


def test_draws_the_references_tokens() -> None:
    logits, parameters, workspace = randn(24, VOCAB, scale=3), draws(24), small(24)
    tokens = sample(logits, *parameters, workspace=workspace)
    assert_won(tokens, race(logits, *parameters))
    assert torch.equal(tokens, drawn(logits, *parameters))
    assert len(set(tokens.tolist())) > 8


def test_a_rows_draw_does_not_depend_on_the_batch() -> None:
    logits, (temperature, seeds, positions), workspace = randn(6, VOCAB), draws(6), small()
    together = sample(logits, temperature, seeds, positions, workspace=workspace)
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(
            sample(logits[one], temperature[one], seeds[one], positions[one], workspace=workspace), together[one]
        )


def test_temperature_zero_is_argmax_beside_drawn_rows() -> None:
    logits, (temperature, seeds, positions), workspace = randn(4, VOCAB), draws(4), small()
    temperature[::2] = 0
    tokens = sample(logits, temperature, seeds, positions, workspace=workspace)
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert torch.equal(tokens[1::2], drawn(logits[1::2], temperature[1::2], seeds[1::2], positions[1::2]))


def test_rows_find_their_state_and_padding_gets_token_0() -> None:
    logits, (temperature, seeds, positions), workspace = randn(3, VOCAB), draws(9), small()
    rows, state = ints(7, -1, 2), [7, 2]
    out = torch.full((3,), -7, dtype=torch.int64, device=DEVICE)
    parameters = torch.stack((positions.float(), temperature, positions.float()), dim=1)  # the temperature is a column
    sample(logits, parameters[:, 1], seeds, positions[:3], workspace=workspace, rows=rows, out=out)
    assert torch.equal(out[::2], drawn(logits[::2], temperature[state], seeds[state], positions[[0, 2]]))
    assert out[1] == 0, "whatever reads the chosen tokens must find tokens"
    assert not workspace.arrivals.any()


def test_what_is_below_the_threshold_is_not_drawn() -> None:
    logits, parameters = randn(16, VOCAB), draws(16)
    thresholds = logits.topk(3).values[:, -1].contiguous()
    thresholds[0] = -torch.inf
    tokens = sample(logits, *parameters, workspace=small(16), thresholds=thresholds)
    assert torch.equal(tokens, drawn(logits.masked_fill(logits < thresholds[:, None], -torch.inf), *parameters))


def test_refuses_what_does_not_fit() -> None:
    workspace = small(2)
    with pytest.raises(ValueError, match="do not fit a workspace"):
        argmax(randn(3, VOCAB), workspace=workspace)
    with pytest.raises(ValueError, match="do not fit a workspace"):
        argmax(randn(2, VOCAB + 1), workspace=workspace)
    with pytest.raises(ValueError, match="without gaps"):
        argmax(randn(2, VOCAB), workspace=workspace, out=ints(0, 0, 0, 0)[::2])
    with pytest.raises(ValueError, match="one stride"):
        truncation_thresholds(randn(2, VOCAB), ints(1, 2), floats(1, 1, 1, 1)[::2], floats(0, 0), workspace=workspace)
    with pytest.raises(ValueError, match="between 1 and"):
        top_logprobs(randn(2, VOCAB), MAX_TOP + 1, workspace=workspace)
    with pytest.raises(ValueError, match="power of two"):
        small(chunk=48)
    with pytest.raises(ValueError, match="float32"):
        add_bias(randn(2, VOCAB).half(), ints(1).view(1, 1), floats(1).view(1, 1))
    with pytest.raises(ValueError, match="counts"):
        apply_penalties(
            randn(2, VOCAB),
            ints(1, 1).view(2, 1),
            ints(0, 0),
            ints(1, 1),
            floats(1, 1),
            floats(0, 0),
            floats(0, 0),
            counts=ints(1).view(1, 1),
        )


# ---- on the GPU: a real vocabulary


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_tokens_and_log_probabilities_over_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits, workspace = randn(200, LARGE_VOCAB, scale=3).to(dtype), large()
    tokens = argmax(logits, workspace=workspace)
    values = logprobs(logits, tokens, workspace=workspace)
    expected = logits.double().log_softmax(-1)
    assert torch.equal(
        tokens,
        torch.where(
            logits == logits.amax(-1, keepdim=True), torch.arange(LARGE_VOCAB, device=DEVICE), LARGE_VOCAB
        ).amin(-1),
    )
    torch.testing.assert_close(values.double(), expected.amax(-1), rtol=0, atol=2e-5)
    ids, tops = top_logprobs(logits, 20, workspace=workspace)
    torch.testing.assert_close(tops.double(), expected.topk(20).values, rtol=0, atol=2e-5)
    torch.testing.assert_close(tops.double(), expected.gather(1, ids), rtol=0, atol=2e-5)
    assert all(len(set(row)) == 20 for row in ids.tolist())


@gpu
def test_draws_the_references_tokens_over_a_large_vocabulary() -> None:
    workspace = large()
    for seed in range(4):
        logits, parameters = randn(256, LARGE_VOCAB, seed=seed, scale=2.5), draws(256, seed)
        tokens = sample(logits, *parameters, workspace=workspace)
        assert_won(tokens, race(logits, *parameters))
        assert (tokens == drawn(logits, *parameters)).float().mean() >= 0.99
        assert torch.equal(
            sample(logits[100:101], *(p[100:101] for p in parameters), workspace=workspace), tokens[100:101]
        )


@gpu
def test_draws_follow_the_softmax() -> None:
    """Chi-squared over 50 tokens and 100,000 draws, 49 degrees of freedom: below 100 but for one seed in 30,000."""
    count, vocab_size = 100_000, 50
    logits = randn(1, vocab_size).expand(count, vocab_size)
    workspace = make_sampling_workspace(count, vocab_size, DEVICE, chunk=16)
    positions = torch.arange(count, device=DEVICE)
    temperature, seeds = torch.full((count,), 0.8, device=DEVICE), torch.full((count,), 5, device=DEVICE)
    halves = [slice(0, count // 2), slice(count // 2, count)]  # a launch has at most 65,535 rows
    tokens = torch.cat(
        [sample(logits[half], temperature[half], seeds[half], positions[half], workspace=workspace) for half in halves]
    )
    expected = (logits[0].double() / 0.8).softmax(-1) * count
    statistic = ((torch.bincount(tokens, minlength=vocab_size) - expected) ** 2 / expected).sum()
    assert statistic < 100


@gpu
def test_a_captured_graph_samples_as_launches_do() -> None:
    """All of a step's sampling, launched dependently, with other logits and parameters at every replay."""
    workspace = large(32)
    logits = randn(32, LARGE_VOCAB, scale=2)
    (temperature, seeds, positions), top_k, top_p, min_p = (
        draws(32),
        ints(*[50] * 32),
        floats(*[0.9] * 32),
        floats(*[0.0] * 32),
    )
    thresholds, tokens, values = (
        torch.empty(32, device=DEVICE),
        torch.empty(32, dtype=torch.int32, device=DEVICE),
        torch.empty(32, device=DEVICE),
    )

    def launch(pdl: bool) -> None:
        truncation_thresholds(
            logits, top_k, top_p, min_p, workspace=workspace, temperature=temperature, out=thresholds, launch_pdl=pdl
        )
        sample(
            logits,
            temperature,
            seeds,
            positions,
            workspace=workspace,
            thresholds=thresholds,
            out=tokens,
            launch_pdl=pdl,
        )
        logprobs(logits, tokens, workspace=workspace, out=values, launch_pdl=pdl)

    launch(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(True)
    for seed in range(5):
        logits.copy_(randn(32, LARGE_VOCAB, scale=2, seed=seed))
        for target, source in zip((temperature, seeds, positions), draws(32, seed), strict=True):
            target.copy_(source)
        top_k.copy_(torch.randint(0, 100, (32,)))
        graph.replay()
        torch.cuda.synchronize()
        replayed = (thresholds.clone(), tokens.clone(), values.clone())
        launch(False)
        assert all(torch.equal(a, b) for a, b in zip(replayed, (thresholds, tokens, values), strict=True))
        cut_logits = logits.masked_fill(logits < thresholds[:, None], -torch.inf)
        assert_won(tokens.long(), race(cut_logits, temperature, seeds, positions))
