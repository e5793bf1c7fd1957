"""RMS norm against float64. Rounding of the output alone is 1.1e-3 in bfloat16 and 1.4e-4 in float16; it happens
twice.
"""

from __future__ import annotations

import pytest
import torch

from paged_kernels.norm import add_scaled, norm
from paged_kernels.norm_shares import mean_squares, norm_parts
from paged_kernels.norm_value import Norm
from paged_kernels.rank_ops import RankOps, Ranks, VocabularyPart
from paged_kernels.reference import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
EPS = 1e-5


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (out.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[out.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


TINY = [(1, 8, torch.float32), (3, 24, torch.float32), (2, 257, torch.float32), (2, 64, torch.float16)]
LARGE = [
    pytest.param(rows, size, dtype, marks=pytest.mark.gpu)
    for rows in (1, 33, 256)
    for size, dtype in (
        (2048, torch.bfloat16),
        (4096, torch.bfloat16),
        (896, torch.bfloat16),
        (5120, torch.float16),
        (16384, torch.bfloat16),
        (3000, torch.float32),
    )
]


@pytest.mark.parametrize(("rows", "size", "dtype"), TINY + LARGE)
def test_equals_float64(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, size, dtype=dtype) * 3, randn(size, dtype=dtype, seed=2)
    out = torch.full_like(x, float("nan"))
    assert norm(x, Norm(weight, EPS), out=out) is out
    assert_close(out, oracle(x, weight))
    assert_close(out, reference.norm(x, Norm(weight, EPS)).double())


KINDS: dict[str, dict[str, bool]] = {
    "1 + w": {"plus_one": True},
    "centred": {"centred": True},
    "LayerNorm": {"centred": True, "bias": True},
}


def kind_of_norm(kind: str, size: int, dtype: torch.dtype) -> Norm:
    fields = dict(KINDS[kind])
    bias = randn(size, dtype=dtype, seed=3) if fields.pop("bias", False) else None
    return Norm(randn(size, dtype=dtype, seed=2), EPS, bias, **fields)


def oracle_of(x: torch.Tensor, how: Norm) -> torch.Tensor:
    wide = x.double() - (x.double().mean(-1, keepdim=True) if how.centred else 0)
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (how.weight.double() + how.plus_one)
    return normed if how.bias is None else normed + how.bias.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "size", "dtype"), [(3, 24, torch.float32), (2, 257, torch.float32), (2, 64, torch.float16), *LARGE]
)
def test_other_norms_equal_float64(rows: int, size: int, dtype: torch.dtype, kind: str) -> None:
    x, how = randn(rows, size, dtype=dtype) * 3 + 1, kind_of_norm(kind, size, dtype)
    out = norm(x, how, out=torch.full_like(x, float("nan")))
    assert_close(out, oracle_of(x, how))
    assert_close(out, reference.norm(x, how).double())


@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
@pytest.mark.parametrize(("rows", "size", "dtype"), [(3, 24, torch.float32), (2, 257, torch.float16), *LARGE])
def test_a_scaled_norm_is_added_to_the_residual_stream(
    rows: int, size: int, dtype: torch.dtype, kind: str | None
) -> None:
    x, residual = randn(rows, size, dtype=dtype) * 3 + 1, randn(rows, size, dtype=dtype, seed=5)
    how = None if kind is None else kind_of_norm(kind, size, dtype)
    expected = residual.double() + 0.22 * (x.double() if how is None else oracle_of(x, how))
    twin = reference.add_scaled(residual.clone(), x, how, 0.22)
    assert add_scaled(residual, x, how, 0.22) is residual
    assert_close(residual, expected)
    assert_close(residual, twin.double())


def test_works_in_place_and_on_strided_rows() -> None:
    wide, weight = randn(4, 40), randn(32, seed=2)
    x = wide[:, :32]
    expected = reference.norm(x.clone(), Norm(weight, EPS))
    beside = wide[:, 32:].clone()
    out = norm(x, Norm(weight, EPS), out=x)
    assert out.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(out, expected)
    assert torch.equal(wide[:, 32:], beside)


def test_leading_dimensions_are_rows() -> None:
    x, weight = randn(2, 3, 16), randn(16, seed=2)
    torch.testing.assert_close(norm(x, Norm(weight, EPS)), reference.norm(x, Norm(weight, EPS)))
    assert norm(x[:0], Norm(weight, EPS)).shape == (0, 3, 16)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit a weight"):
        norm(randn(2, 8), Norm(randn(4), EPS))
    with pytest.raises(ValueError, match="do not fit a weight"):
        norm(randn(2, 8), Norm(randn(8).half(), EPS))
    with pytest.raises(ValueError, match="do not fit a bias"):
        norm(randn(2, 8), Norm(randn(8), EPS, randn(4)))
    with pytest.raises(ValueError, match="do not fit, or"):
        add_scaled(randn(2, 8), randn(2, 4), None, 1.0)
    with pytest.raises(ValueError, match="not of x's shape"):
        norm(randn(2, 8), Norm(randn(8), EPS), out=randn(1, 8))
    with pytest.raises(ValueError, match="contiguous"):
        norm(randn(8, 2).T, Norm(randn(8), EPS))


@pytest.mark.gpu
def test_a_chain_of_dependent_launches_is_bit_equal_to_a_plain_one() -> None:
    """Programmatic dependent launch overlaps each kernel with the end of the one before; nothing may be read too
    early.
    """
    x, weight = randn(200, 4096, dtype=torch.bfloat16), randn(4096, dtype=torch.bfloat16, seed=2)
    results = []
    for launch_pdl in (False, True):
        here, there = x.clone(), torch.empty_like(x)
        for _ in range(50):
            norm(here, Norm(weight, EPS), out=there, launch_pdl=launch_pdl)
            norm(there, Norm(weight, EPS), out=here, launch_pdl=launch_pdl)
        results.append((here, there))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


SHARES = [(1, 48, 16, torch.float32), (3, 40, 24, torch.float16)]
SHARES += [pytest.param(33, 3072, 512, torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("rows", "q_size", "k_size", "dtype"), SHARES)
def test_norms_of_all_heads_are_those_of_the_parts_together(
    rows: int, q_size: int, k_size: int, dtype: torch.dtype
) -> None:
    """Two ranks' parts by kernels, against the whole rows in plain torch; what lies behind the keys stays as it is."""
    q, k, v = (randn(rows, 2 * size, dtype=dtype, seed=size) * 3 for size in (q_size, k_size, 8))
    norms = [Norm(randn(2 * size, dtype=dtype, seed=size + 1), EPS) for size in (q_size, k_size)]
    expected = [reference.norm(x, norm) for x, norm in zip((q, k), norms, strict=True)]
    parts = [torch.cat([x.chunk(2, 1)[rank] for x in (q, k, v)], 1) for rank in range(2)]
    squares = sum(mean_squares(part, (q_size, k_size)) for part in parts) / 2
    for rank, part in enumerate(parts):
        own = tuple(Norm(norm.weight.chunk(2)[rank], EPS, partial=True) for norm in norms)
        plain = RankOps(Ranks(), VocabularyPart(0, 1, 1, 1)).norm_parts(part.clone(), own, squares)
        found = norm_parts(part, own, squares)
        assert_close(found, plain.double())
        for x, whole in zip(found.split([q_size, k_size, 8], 1), (*expected, v), strict=True):
            assert_close(x, whole.chunk(2, 1)[rank].double())


def test_shares_of_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \(2, 8\) have no 8 and 4 numbers"):
        mean_squares(randn(2, 8), (8, 4))
    norms = tuple(Norm(randn(4), eps) for eps in (EPS, 2 * EPS))
    with pytest.raises(ValueError, match="plain RMS norms of one kind"):
        norm_parts(randn(2, 8), norms, randn(2, 2))
    with pytest.raises(ValueError, match=r"mean squares \(1, 2\)"):
        norm_parts(randn(2, 8), (norms[0], norms[0]), randn(1, 2))
