"""Products of few tokens with quantised weights, against float64 products with what the weights mean.

Tolerances: as test_small_linear.py; quant_narrow_linear rounds numbers times scales to x's type, 1.4e-4 in float16 and
    1.1e-3 in bfloat16, less when summed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_kernels.codes import dequantise, quantise
from paged_kernels.experts import MXFP4
from paged_kernels.linear import Format, Linear
from paged_kernels.norm_value import Norm
from paged_kernels.quant_linear import (
    QuantNarrowShape,
    quant_narrow_linear,
    reaches,
)
from paged_kernels.quant_vector import QuantVectorShape, quant_vector_linear
from paged_kernels.small_linear import LinearWorkspace, make_linear_workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
EPS = 1e-5
OPTIONS = ["gate and bias", "residual"]
FORMATS = {
    "fp8-channel": Format("fp8"),
    "fp8-block": Format("fp8", (16, 128)),
    "int8-channel": Format("int8"),
    "int8-channel-zeros": Format("int8", zeros=True),
    "int8-g32-zeros": Format("int8", (1, 32), zeros=True),
    "int4-channel": Format("int4"),
    "int4-channel-zeros": Format("int4", zeros=True),
    "int4-g128": Format("int4", (1, 128), scale_dtype=torch.float16),
    "int4-g32-zeros": Format("int4", (1, 32), zeros=True),
    "nvfp4": Format("fp4", (1, 16), row_scales=True, scale_dtype=torch.float8_e4m3fn),
    "mxfp4": Format("fp4", (1, 32)),
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def make_linear(num_rows: int, num_columns: int, format: Format, dtype: torch.dtype, bias: bool) -> Linear:
    """Random; zeros and row scales differ from row to row."""
    linear = quantise(randn(num_rows, num_columns, seed=1, scale=num_columns**-0.5), format)
    if linear.zero is not None:
        linear.zero.copy_(
            linear.zero.int() + torch.arange(linear.zero.numel(), device=DEVICE).view_as(linear.zero) % 5 - 2
        )
    if linear.row_scale is not None:
        linear.row_scale.mul_(torch.linspace(0.5, 2, num_rows, device=DEVICE))
    return replace(linear, bias=randn(num_rows, dtype=dtype, seed=2) if bias else None)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (out.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[out.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


def oracle(
    x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, gated: bool, norm: torch.Tensor | None = None
) -> torch.Tensor:
    wide = x.double()
    if norm is not None:
        wide = norm.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    result = wide @ dequantise(linear).double().T
    if linear.bias is not None:
        result = result + linear.bias.double()
    if gated:
        gate, up = result.chunk(2, -1)
        result = torch.nn.functional.silu(gate) * up
    return result if residual is None else result + residual.double()


TINY_VECTORS = [(5, 256, torch.float16, QuantVectorShape(4, 64, 1))]
LARGE_VECTORS = [
    pytest.param(rows, columns, torch.bfloat16, None, marks=pytest.mark.gpu)
    for rows, columns in ((4096, 4096), (14336, 4096), (4096, 14336))
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_rows", "num_columns", "dtype", "shape"), TINY_VECTORS + LARGE_VECTORS)
def test_one_token_equals_float64(
    num_rows: int, num_columns: int, dtype: torch.dtype, shape: QuantVectorShape | None, name: str, options: str
) -> None:
    gated = "gate" in options
    num_rows = num_rows if FORMATS[name].block[0] == 1 else -(-num_rows // 16) * 16
    x = randn(1, num_columns, dtype=dtype)
    linear = make_linear(num_rows * (2 if gated else 1), num_columns, FORMATS[name], dtype, "bias" in options)
    residual = randn(1, num_rows, dtype=dtype, seed=3) if "residual" in options else None
    norm = randn(num_columns, dtype=dtype, seed=4) if gated else None
    out = torch.full((1, num_rows), float("nan"), dtype=dtype, device=DEVICE)
    given = None if norm is None else Norm(norm, EPS)
    assert quant_vector_linear(x, linear, norm=given, gated=gated, residual=residual, out=out, shape=shape) is out
    assert_close(out, oracle(x, linear, residual, gated, norm))


TINY = [
    (3, 20, 256, torch.float16, QuantNarrowShape(16, 64, 2, 2, 1)),
    (3, 32, 384, torch.float16, QuantNarrowShape(16, 128, 2, 2, 1)),  # whole tiles of rows, not of columns
    # two tiles of tokens
    (9, 20, 384, torch.float32, QuantNarrowShape(16, 64, 2, 2, 1, tokens=8, ahead=True, staged=True)),
    (3, 32, 256, torch.float16, QuantNarrowShape(32, 128, 1, 2, 1, after=False, ahead=True)),
]
LARGE = [
    pytest.param(tokens, rows, columns, torch.bfloat16, None, marks=pytest.mark.gpu)
    for tokens in (1, 2, 16, 31, 64, 128, 200)
    for rows, columns in ((4096, 4096), (14336, 4096), (4096, 14336))
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns", "dtype", "shape"), TINY + LARGE)
def test_few_tokens_equal_float64(
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    dtype: torch.dtype,
    shape: QuantNarrowShape | None,
    name: str,
    options: str,
) -> None:
    gated, workspace = "gate" in options, make_linear_workspace(DEVICE)
    num_rows = num_rows if FORMATS[name].block[0] == 1 else -(-num_rows // 16) * 16
    x = randn(num_tokens, num_columns, dtype=dtype)
    linear = make_linear(num_rows * (2 if gated else 1), num_columns, FORMATS[name], dtype, "bias" in options)
    residual = randn(num_tokens, num_rows, dtype=dtype, seed=3) if "residual" in options else None
    for _ in range(2):  # the second launch finds the counters as the first left them
        out = torch.full((num_tokens, num_rows + 8), float("nan"), dtype=dtype, device=DEVICE)
        quant_narrow_linear(
            x, linear, out=out[:, :num_rows], workspace=workspace, gated=gated, residual=residual, shape=shape
        )
        assert_close(out[:, :num_rows], oracle(x, linear, residual, gated))
        assert out[:, num_rows:].isnan().all()
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("name", [name for name in FORMATS if "channel" in name])
@pytest.mark.parametrize("num_columns", [64, 96, 176])
def test_rows_shorter_than_a_tile_equal_float64(num_columns: int, name: str) -> None:
    """Of two numbers in a byte also those of 176, which are 88 bytes of a tile of 128."""
    linear, x = make_linear(16, num_columns, FORMATS[name], torch.float32, True), randn(3, num_columns)
    found = quant_narrow_linear(x, linear, workspace=make_linear_workspace(DEVICE))
    assert_close(found, oracle(x, linear, None, False))


def test_parts_of_several_tiles_of_tokens_stay_within_their_workspace() -> None:
    """Two tiles of tokens times two of rows in two parts just fill it."""
    shape, x = QuantNarrowShape(16, 64, 2, 2, 1, tokens=8), randn(9, 256, dtype=torch.float16)
    linear = make_linear(20, 256, FORMATS["fp8-channel"], torch.float16, False)
    memory = torch.full((2048,), float("nan"), device=DEVICE)
    workspace = LinearWorkspace(memory[:1024], torch.zeros(4, dtype=torch.int32, device=DEVICE))
    assert_close(quant_narrow_linear(x, linear, workspace=workspace, shape=shape), oracle(x, linear, None, False))
    assert memory[:1024].isfinite().all() and memory[1024:].isnan().all()


def test_refuses_what_does_not_fit() -> None:
    linear = make_linear(8, 96, Format("int4", (1, 48)), torch.float32, False)
    assert not reaches(linear)
    with pytest.raises(ValueError, match=r"block=\(1, 48\).* is not read by these kernels"):
        quant_vector_linear(randn(1, 96), linear)
    linear = make_linear(8, 64, MXFP4, torch.float32, False)
    with pytest.raises(ValueError, match=r"order='words'.* is not read by these kernels"):
        quant_narrow_linear(randn(2, 64), linear, workspace=make_linear_workspace(DEVICE))
    linear = make_linear(8, 64, Format("fp8"), torch.float32, False)
    with pytest.raises(ValueError, match="1 to 1 tokens"):
        quant_vector_linear(randn(2, 64), linear)
    with pytest.raises(ValueError, match=r"a weight of 8 x 64 do not fit"):
        quant_narrow_linear(randn(2, 32), linear, workspace=make_linear_workspace(DEVICE))
    with pytest.raises(ValueError, match="residual"):
        quant_vector_linear(randn(1, 64), linear, residual=randn(1, 5))
