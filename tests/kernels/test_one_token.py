"""Products of one token with fp8 in words and int4 in quads, against float64 products with what the weights mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from paged_kernels.fp8_vector import Fp8VectorShape, fp8_vector_linear
from paged_kernels.int4_vector import Int4VectorShape, int4_vector_linear
from paged_kernels.linear import Format, Linear
from paged_kernels.norm_value import Norm
from tests.kernels.test_quant_linear import DEVICE, EPS, assert_close, make_linear, oracle, randn

FP8 = {"fp8 rows": Format("fp8"), "fp8 blocks": Format("fp8", (16, 128))}
INT4 = {
    "int4 g128": Format("int4", (1, 128), scale_dtype=torch.float16, order="quads"),
    "int4 g256 zeros": Format("int4", (1, 256), zeros=True, order="quads"),
    "int4 rows zeros": Format("int4", zeros=True, scale_dtype=torch.bfloat16, order="quads"),
}
FORMATS = FP8 | INT4
SHAPES: dict[str, list[Any]] = {
    "fp8": [Fp8VectorShape(4, 256, 1), Fp8VectorShape(8, 1024, 2)],  # in turns, and at once with more than a row has
    "int4": [Int4VectorShape(4, 2, 1, 2), Int4VectorShape(8, 4, 1)],
}
MATRICES = [(4096, 4096), (1000, 1280), (6144, 2048), (4096, 14336)]


def product(x: torch.Tensor, linear: Linear, **given: Any) -> torch.Tensor:
    return (fp8_vector_linear if linear.format.codes == "fp8" else int4_vector_linear)(x, linear, **given)


def check(name: str, num_rows: int, num_columns: int, dtype: torch.dtype, hanging: str, **given: Any) -> None:
    gated = hanging == "gate"
    x = randn(1, num_columns + 16, dtype=dtype)[:, :num_columns]
    linear = make_linear(num_rows * (2 if gated else 1), num_columns, FORMATS[name], dtype, hanging != "nothing")
    residual = randn(1, num_rows, dtype=dtype, seed=3) if hanging == "residual" else None
    norm = randn(num_columns, dtype=dtype, seed=4) if gated else None
    expected = oracle(x, linear, residual, gated, norm)
    out = torch.full((1, num_rows), float("nan"), dtype=dtype, device=DEVICE) if residual is None else residual
    given |= {"norm": None if norm is None else Norm(norm, EPS), "gated": gated, "residual": residual}
    assert product(x, linear, out=out, **given) is out
    assert_close(out, expected)


@pytest.mark.one_in(2)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("hanging", ["nothing", "gate", "residual"])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_float64(name: str, hanging: str, turns: int) -> None:
    rows = 32 if name == "fp8 blocks" else 20  # the last program has less than it takes
    check(name, rows, 768, torch.float16, hanging, shape=SHAPES[name.split()[0]][turns])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hanging", ["gate", "residual"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_rows", "num_columns"), MATRICES)
def test_tuned_shapes_equal_float64(
    num_rows: int, num_columns: int, name: str, hanging: str, dtype: torch.dtype
) -> None:
    check(
        name,
        -(-num_rows // 16) * 16 if name == "fp8 blocks" else num_rows,
        num_columns,
        dtype,
        hanging,
        launch_pdl=True,
    )


@pytest.mark.parametrize("name", ["fp8 rows", "int4 g128"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_swallowed(number: float, name: str) -> None:
    x = randn(1, 256, dtype=torch.float16)
    x[0, 77] = number
    linear = make_linear(16, 256, FORMATS[name], torch.float16, bias=False)
    assert not product(x, linear).isfinite().any()


@pytest.mark.parametrize("name", ["fp8 rows", "int4 g128"])
def test_a_token_of_zeros_leaves_the_bias(name: str) -> None:
    linear = make_linear(16, 256, FORMATS[name], torch.float16, bias=True)
    out = product(torch.zeros(1, 256, dtype=torch.float16, device=DEVICE), linear)
    torch.testing.assert_close(out[0], linear.bias)


def test_a_block_of_large_numbers_takes_no_digits_from_the_others() -> None:
    """Each block of 128 columns is rounded by a scale of its own."""
    x = randn(1, 512, dtype=torch.float16)
    x[0, :128] *= 1000
    linear = make_linear(16, 512, FORMATS["int4 g128"], torch.float16, bias=False)
    scale = linear.scale.clone()
    scale[:, 0] = 0
    quiet = replace(linear, scale=scale)
    assert_close(product(x, quiet), oracle(x, quiet, None, False))


def test_refusals() -> None:
    x = randn(1, 256, dtype=torch.float16)
    int4 = make_linear(16, 256, FORMATS["int4 g128"], torch.float16, bias=False)
    fp8 = make_linear(16, 256, FORMATS["fp8 rows"], torch.float16, bias=False)
    for wrong in (fp8_vector_linear, int4_vector_linear):
        linear, other = (fp8, int4) if wrong is fp8_vector_linear else (int4, fp8)
        with pytest.raises(ValueError):
            wrong(x, other)
        with pytest.raises(ValueError, match="do not fit"):
            wrong(torch.cat((x, x)), linear)
        with pytest.raises(ValueError, match="RMS norm"):
            wrong(x, linear, norm=Norm(x[0], EPS, centred=True))
    with pytest.raises(ValueError, match="not read in words"):
        fp8_vector_linear(randn(1, 24), make_linear(4, 24, FORMATS["fp8 rows"], torch.float32, bias=False))
