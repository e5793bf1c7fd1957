"""The reference's sampling ops against brute force, against transformers' logits processors, and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from paged_kernels.reference import reference

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run() -> None:
    torch.manual_seed(0)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    rows = len(logits)
    settings = torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p)
    return reference.truncate(logits, *settings, max_top_k=top_k)


def survivors(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[bool]:
    """The definition, a token at a time, in float64."""
    p = torch.softmax(logits.double(), 0)
    p = torch.where(p < min_p * p.max(), 0, p)
    if top_k > 0:
        kth = p.sort(descending=True).values[min(top_k, len(p)) - 1]
        p = torch.where(p < kth, 0, p)
    p = p / p.sum()
    if top_p < 1:
        p = torch.where(torch.stack([p[p > q].sum() < top_p for q in p]), p, 0)
    return (p > 0).tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_truncation_keeps_the_tokens_of_its_definition(setting: dict[str, float], ties: bool) -> None:
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)) * 2
    logits = logits.round() if ties else logits
    kept = truncate(logits, **setting) > -torch.inf
    assert kept.tolist() == [survivors(row, **setting) for row in logits]


def test_truncation_leaves_what_it_keeps_unchanged() -> None:
    logits = torch.randn(5, 60)
    cut = truncate(logits, top_k=20, top_p=0.8)
    assert torch.equal(cut[cut > -torch.inf], logits[cut > -torch.inf])


def test_rows_truncate_independently_of_each_other() -> None:
    logits = torch.randn(4, 50)
    settings = [OFF, {**OFF, "top_k": 5}, {**OFF, "top_p": 0.5}, {**OFF, "min_p": 0.2}]
    columns = [torch.tensor([setting[name] for setting in settings]) for name in ("top_k", "top_p", "min_p")]
    mixed = reference.truncate(logits, *columns, max_top_k=0)
    for row, setting in enumerate(settings):
        assert torch.equal(mixed[row], truncate(logits[row : row + 1], **setting)[0])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_softmax(varies: str) -> None:
    n = 40_000
    logits = torch.linspace(-3, 1, 20)
    along, still = torch.arange(n), torch.full((n,), 12345)
    seeds, positions = (along, still) if varies == "seed" else (still, along)
    tokens = reference.sample(logits.expand(n, -1), seeds, positions)
    expected = torch.softmax(logits.double(), 0).numpy() * n
    assert chi_square(np.bincount(tokens.numpy(), minlength=20), expected) < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("varies", ["seed", "position"])
def test_successive_draws_are_independent(varies: str) -> None:
    n = 40_000
    along, still = torch.arange(n + 1), torch.full((n + 1,), 7)
    seeds, positions = (along, still) if varies == "seed" else (still, along)
    tokens = reference.sample(torch.zeros(n + 1, 5), seeds, positions).numpy()
    pairs = np.bincount(tokens[:-1] * 5 + tokens[1:], minlength=25)
    assert chi_square(pairs, np.full(25, n / 25)) < 51.2  # 24 degrees of freedom, p = 0.001


def test_a_draw_equals_its_definition_in_whole_numbers() -> None:
    mask = 2**32 - 1

    def fmix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B & mask
        h = (h ^ h >> 13) * 0xC2B2AE35 & mask
        return h ^ h >> 16

    def splitmix64(seed: int, number: int) -> int:
        z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        z = (z ^ z >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        return z ^ z >> 31

    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    assert fmix32(1) == 0x514E28B7  # murmur3's
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    seeds, positions = [0, 1, 2**63, 2**64 - 1, 0xDEADBEEF12345678, 42], [0, 1, 5, 70_000, 2**31 - 1, 12]
    drawn = reference.sample(logits, torch.tensor(np.array(seeds, np.uint64).view(np.int64)), torch.tensor(positions))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = splitmix64(seed, position)
        hashes = [fmix32(fmix32(t * 0x9E3779B1 + (key & mask) & mask) ^ key >> 32) for t in range(300)]
        scores = [logits[row, t].item() - math.log(-math.log1p(-(h + 0.5) / 2**32)) for t, h in enumerate(hashes)]
        assert drawn[row] == int(np.argmax(scores))


def test_a_banned_token_is_never_drawn() -> None:
    logits = torch.zeros(5000, 4)
    logits[:, 2] = -torch.inf
    assert set(reference.sample(logits, torch.arange(5000), torch.zeros(5000)).tolist()) == {0, 1, 3}


def test_repetition_penalty_equals_transformers() -> None:
    logits, history = torch.randn(3, 50), torch.randint(0, 50, (3, 30))
    lens = torch.tensor([30, 4, 17])
    neutral = torch.zeros(3)
    ours = reference.apply_penalties(
        logits, history.int(), torch.tensor([10, 2, 17]), lens, torch.full((3,), 1.7), neutral, neutral
    )
    for row in range(3):
        theirs = RepetitionPenaltyLogitsProcessor(1.7)(
            history[row : row + 1, : lens[row]], logits[row : row + 1].clone()
        )
        assert torch.equal(ours[row], theirs[0])


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.randn(1, 6)
    # the prompt is 0 1; the last 5 is beyond the 7 tokens
    history = torch.tensor([[0, 1, 1, 2, 2, 2, 5, 5]], dtype=torch.int32)
    one = torch.ones(1)
    out = reference.apply_penalties(logits, history, torch.tensor([2]), torch.tensor([7]), one, 0.5 * one, 0.25 * one)
    counts = torch.tensor([0.0, 1, 3, 0, 0, 1])
    assert torch.allclose(out, logits - 0.25 * counts - 0.5 * (counts > 0))


def test_bad_words_equal_transformers() -> None:
    words = [[3], [4, 5], [4, 6, 7], [1, 2, 3, 9]]
    table = torch.tensor([[[-1] * (4 - len(word)) + word for word in words]], dtype=torch.int32)
    for history in ([4], [1, 4], [4, 6], [8, 1, 2, 3], [2], [9, 9, 9, 9, 4]):
        recent = torch.tensor([([-2] * 3 + history)[-3:]], dtype=torch.int32)
        logits = torch.randn(1, 10)
        theirs = NoBadWordsLogitsProcessor(words, eos_token_id=0)(torch.tensor([history]), logits.clone())
        assert torch.equal(reference.ban_bad_words(logits, table, recent), theirs)


def test_bias_is_added_and_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = torch.randn(2, 5)
    ids = torch.tensor([[0, 3, -1], [4, 5, 99]], dtype=torch.int32)
    out = reference.add_bias(logits, ids, torch.tensor([[1.5, -torch.inf, 7], [-2, 7, 7]]))
    expected = logits.clone()
    expected[0, 0] += 1.5
    expected[0, 3] = -torch.inf
    expected[1, 4] -= 2
    assert torch.equal(out, expected)


def test_logprobs_are_the_log_softmax() -> None:
    logits = torch.randn(4, 30) * 5
    expected = torch.log_softmax(logits.double(), -1)
    ids, values = reference.top_logprobs(logits, 3)
    assert torch.equal(ids, expected.topk(3).indices)
    assert torch.allclose(values.double(), expected.topk(3).values, atol=1e-5)
    assert torch.allclose(
        reference.logprobs(logits, torch.tensor([0, 7, 8, 29])).double(), expected[range(4), [0, 7, 8, 29]], atol=1e-5
    )
