"""top_k, top_p and min_p as a threshold on the logits, against the reference and float64 sums."""

from __future__ import annotations

import math

import pytest
import torch

from paged_kernels.reference import reference
from paged_kernels.sampling import (
    SamplingWorkspace,
)
from paged_kernels.truncation import truncation_thresholds
from tests.kernels.sampling_cases import DEVICE, LARGE_VOCAB, VOCAB, floats, gpu, ints, large, randn, small


def cut(
    logits: torch.Tensor,
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
    workspace: SamplingWorkspace,
    **options: torch.Tensor,
) -> torch.Tensor:
    return truncation_thresholds(logits, ints(*top_k), floats(*top_p), floats(*min_p), workspace=workspace, **options)


def assert_cuts_like_the_reference(
    logits: torch.Tensor, top_k: list[int], top_p: list[float], min_p: list[float], workspace: SamplingWorkspace
) -> None:
    thresholds = cut(logits, top_k, top_p, min_p, workspace)
    expected = reference.truncate(logits, ints(*top_k), floats(*top_p), floats(*min_p), 0)
    kept = torch.where(logits < thresholds[:, None], -torch.inf, logits)
    assert torch.equal(kept, expected), (
        f"kept {kept.isfinite().sum(-1).tolist()} tokens, expected {expected.isfinite().sum(-1).tolist()}"
    )
    assert not workspace.arrivals.any(), "an arrival counter was left set"


NONE = (0, 1.0, 0.0)


CUTS = {
    "nothing": [NONE, NONE, (VOCAB, 1.0, 0.0), (-1, 1.0, 0.0)],
    "top-k": [(1, 1.0, 0.0), (5, 1.0, 0.0), (64, 1.0, 0.0), (199, 1.0, 0.0)],
    "top-p": [(0, 0.1, 0.0), (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 0.999, 0.0)],
    "min-p": [(0, 1.0, 1.0), (0, 1.0, 0.3), (0, 1.0, 0.01), (0, 1.0, 1e-6)],
    "all of them": [(20, 0.9, 0.05), (3, 0.5, 0.9), (150, 0.99, 0.001), (7, 1.0, 0.3)],
    "each row another": [NONE, (9, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2)],
    "top-k and top-p": [(50, 0.95, 0.0), (2, 0.1, 0.0), (100, 0.5, 0.0), (1, 0.5, 0.0)],
    "next to nothing": [(0, 1e-9, 0.0), (1, 1e-9, 0.0), (0, 0.0, 0.0), (199, 0.9999, 1e-9)],
}


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS.keys())
def test_truncation_keeps_what_the_reference_keeps(case: list[tuple[int, float, float]]) -> None:
    """Flat rows need the passes and the search over a whole row: their chunk has room for 64 logits. Peaked ones do
    not.
    """
    top_k, top_p, min_p = (list(column) for column in zip(*case, strict=True))
    logits = randn(4, VOCAB, seed=1)
    logits[:2] *= 0.2
    logits[2:] *= 5
    assert_cuts_like_the_reference(logits, top_k, top_p, min_p, small())


def test_truncation_keeps_or_drops_equal_logits_together() -> None:
    logits = torch.randint(-2, 3, (4, VOCAB), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    logits[1, 7] = 9.0
    logits[2] = 1.0
    logits[3] = torch.where(torch.arange(VOCAB, device=DEVICE) % 2 == 0, 0.0, -0.0)
    assert_cuts_like_the_reference(logits, [60, 0, 60, 60], [0.5, 0.3, 0.5, 0.5], [0.0] * 4, small(chunk=128))


def test_truncation_lives_with_banned_tokens() -> None:
    logits = randn(4, VOCAB, scale=2)
    logits[0, 5:] = -torch.inf
    logits[1, :190] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3, 64:128] = -torch.inf
    assert_cuts_like_the_reference(
        logits, [8, 0, 180, 150], [0.9, 0.9, 0.999, 1.0], [0.1, 0.0, 0.0, 0.0], small(chunk=128)
    )


def test_truncation_of_scaled_logits_cuts_at_the_unscaled_logit() -> None:
    logits, temperature = randn(4, VOCAB, scale=2), floats(0.5, 2.0, 1.3, 0.0)
    thresholds = cut(
        logits, [0, 40, 0, 5], [0.9, 0.8, 1.0, 0.5], [0.0, 0.0, 0.1, 0.5], small(), temperature=temperature
    )
    scaled = logits[:3] / temperature[:3, None]
    expected = reference.truncate(scaled, ints(0, 40, 0), floats(0.9, 0.8, 1.0), floats(0.0, 0.0, 0.1), 0)
    assert torch.equal(logits[:3] < thresholds[:3, None], expected == -torch.inf)
    assert thresholds[3] == -torch.inf


def test_truncation_finds_its_rows_parameters() -> None:
    logits = randn(3, VOCAB)
    out = floats(7, 7, 7)
    truncation_thresholds(
        logits,
        ints(0, 4, 9, 0),
        floats(0.9, 1.0, 1.0, 1.0),
        floats(0, 0, 0, 0),
        workspace=small(),
        temperature=floats(1, 1, 1, 1),
        rows=ints(2, -1, 1),
        out=out,
    )
    assert torch.equal(
        out,
        torch.stack(
            (logits[0].topk(9).values[-1], torch.tensor(-torch.inf, device=DEVICE), logits[2].topk(4).values[-1])
        ),
    )


def assert_cut_is_right(
    logits: torch.Tensor, thresholds: torch.Tensor, top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    """Against float64 sums; a token may go the other way if float32 cannot tell its mass from the limit."""
    for row in range(len(logits)):
        x, threshold = logits[row].double(), thresholds[row].double()
        left = x[x >= x.max() + math.log(min_p[row])] if min_p[row] > 0 else x
        if 0 < top_k[row] < len(x):
            left = left[left >= x.topk(top_k[row]).values[-1]]
        kept = x[x >= threshold]
        if top_p[row] >= 1:
            assert len(kept) == len(left), f"row {row}: kept {len(kept)} of {len(left)}"
            continue
        probability = (left - x.max()).exp() / (left - x.max()).exp().sum()
        above = float(probability[left > threshold].sum())
        assert above < top_p[row] + 2e-6, f"row {row}: {above} is above the threshold"
        lower = left[left < threshold]
        if len(lower):
            assert float(probability[left > lower.max()].sum()) >= top_p[row] - 2e-6, f"row {row}: cut too high"
        assert torch.equal(kept.sort().values, left[left >= threshold].sort().values)


@gpu
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_over_a_large_vocabulary(scale: float, dtype: torch.dtype) -> None:
    logits, workspace = randn(12, LARGE_VOCAB, scale=scale).to(dtype), large()
    top_k = [0, 50, 0, 1, 20, 4096, 6000, 128255, 0, 0, 1000, 0]
    top_p = [0.9, 1.0, 1.0, 1.0, 0.8, 1.0, 0.9, 0.5, 0.999, 0.01, 0.95, 0.95]
    min_p = [0.0, 0.0, 0.1, 0.0, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01]
    thresholds = cut(logits, top_k, top_p, min_p, workspace)
    assert_cut_is_right(logits, thresholds, top_k, top_p, min_p)
    assert torch.equal(cut(logits, top_k, top_p, min_p, workspace), thresholds)
    for row in range(12):
        alone = cut(logits[row : row + 1], top_k[row : row + 1], top_p[row : row + 1], min_p[row : row + 1], workspace)
        assert torch.equal(alone, thresholds[row : row + 1]), f"row {row} is cut elsewhere when alone"
