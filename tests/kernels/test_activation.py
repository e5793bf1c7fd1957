"""silu(gate) * up against float64. Rounding of the output alone is 1.1e-3 in bfloat16 and 1.4e-4 in float16; it happens
twice.
"""

from __future__ import annotations

import pytest
import torch

from paged_kernels.activation import activate, gate, scale_logits
from paged_kernels.reference import reference
from paged_kernels.reference_layers import ACTIVATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE, dtype)


LARGE = [
    pytest.param(rows, size, dtype, marks=pytest.mark.gpu)
    for rows in (1, 33, 256)
    for size, dtype in ((8192, torch.bfloat16), (14336, torch.bfloat16), (3000, torch.float16), (4864, torch.float32))
]


@pytest.mark.parametrize(
    ("rows", "size", "dtype"), [(1, 5, torch.float32), (3, 1500, torch.float32), (2, 64, torch.float16), *LARGE]
)
def test_equals_float64(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * size, dtype=dtype)
    out = torch.full((rows, size), float("nan"), device=DEVICE, dtype=dtype)
    assert gate(gate_up, out=out) is out
    expected = reference.gate(gate_up.double())
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], f"relative RMS error {error:.2e}"  # NaN fails too


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, on purpose; the interpreter says so
def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -90.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    torch.testing.assert_close(gate(gate_up), torch.tensor([[0.0, 400.0, 0.0, 0.0]], device=DEVICE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size", "dtype"), [(3, 1100, torch.float32), (2, 64, torch.float16), *LARGE])
def test_every_activation_equals_float64_alone_and_as_a_gate(
    rows: int, size: int, dtype: torch.dtype, activation: str
) -> None:
    x = randn(rows, 2 * size, dtype=dtype) * 3
    for out, expected in (
        (gate(x, activation), reference.gate(x.double(), activation)),
        (activate(x.clone(), activation), reference.activate(x.double(), activation)),
    ):
        error = (out.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[dtype], f"relative RMS error {error:.2e}"  # NaN fails too


@pytest.mark.parametrize("soft_cap", [None, 2.0], ids=str)
@pytest.mark.parametrize(("rows", "size", "dtype"), [(3, 1100, torch.float32), (2, 64, torch.float16), *LARGE])
def test_logits_are_scaled_and_capped_in_place(
    rows: int, size: int, dtype: torch.dtype, soft_cap: float | None
) -> None:
    logits = randn(rows, size, dtype=dtype) * 9
    expected = reference.scale_logits(logits.double(), 0.5, soft_cap)
    assert scale_logits(logits, 0.5, soft_cap) is logits
    error = (logits.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], f"relative RMS error {error:.2e}"  # NaN fails too


def test_rows_may_be_strided_and_out_may_be_the_gate() -> None:
    wide = randn(3, 24)
    gate_up = wide[:, :16]
    expected, rest = reference.gate(gate_up.clone()), wide[:, 8:].clone()
    gate(gate_up, out=wide[:, :8])
    torch.testing.assert_close(wide[:, :8], expected)
    assert torch.equal(wide[:, 8:], rest)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        gate(randn(2, 7))
    with pytest.raises(ValueError, match="do not fit"):
        gate(randn(2, 8), out=randn(2, 8))
    with pytest.raises(ValueError, match="none of silu, gelu"):
        activate(randn(2, 8), "swish")
    with pytest.raises(ValueError, match="contiguous"):
        gate(randn(8, 2).T)
