"""Products of few rounded tokens with weights of fp8, against float64 products of what both sides mean.

Tolerances: the interpreter adds in float32; the tensor cores add products of fp8 with 14 bits, up to 256 columns of
    them before float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from paged_kernels.codes import quantise
from paged_kernels.fp8_narrow import Fp8NarrowShape, fp8_narrow_linear, fp8_narrow_shape
from paged_kernels.linear import Format, Linear, Rounding
from paged_kernels.small_linear import LinearWorkspace, make_linear_workspace
from tests.kernels.test_quant_linear import assert_close, randn
from tests.kernels.test_quantised_products import oracle_of_rounded, rounded_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "channel": Format("fp8", rounding=Rounding("fp8")),
    "block": Format("fp8", (128, 128), Rounding("fp8", 128)),
    "low block": Format("fp8", (16, 128), Rounding("fp8", 128)),
}
HANGING_ON = {"nothing": {}, "bias": {"bias": True}, "gate": {"gated": True, "bias": True}, "residual": {"adds": True}}
TINY = [
    (17, 64, 256, Fp8NarrowShape(32, 32, 128, 1, 2, 1)),
    (40, 64, 512, Fp8NarrowShape(16, 32, 128, 4, 3, 1)),  # two tiles of tokens, and parts of each
    (20, 48, 400, Fp8NarrowShape(32, 32, 128, 2, 2, 1)),  # ragged rows, and columns of a group
    (33, 48, 640, Fp8NarrowShape(32, 64, 256, 2, 2, 1)),  # the second part has less
]
# tokens, rows of the result, columns, format, companions: a case for each shape of the rule, and ragged ones
LARGE = [
    (2, 4096, 4096, "channel", "residual"),
    (17, 6144, 1104, "channel", "nothing"),
    (20, 14336, 1024, "channel", "gate"),
    (64, 12288, 2048, "channel", "gate"),
    (50, 1000, 1104, "channel", "bias"),
    (2, 14336, 1024, "block", "gate"),
    (17, 4096, 14336, "block", "residual"),
    (50, 1024, 14336, "low block", "residual"),
    (64, 12288, 2048, "block", "gate"),
    (128, 1000, 1104, "block", "bias"),
    (128, 8192, 1024, "block", "gate"),
    (256, 1024, 14336, "block", "residual"),
]


def make_linear(rows: int, columns: int, format: Format, dtype: torch.dtype, bias: bool) -> Linear:
    linear = quantise(randn(rows, columns, seed=1, scale=columns**-0.5), format)
    return replace(linear, bias=randn(rows, dtype=dtype, seed=2) if bias else None)


def check(
    num_tokens: int, num_rows: int, num_columns: int, name: str, hanging: str, dtype: torch.dtype, **given: Any
) -> None:
    """A product and once more, which finds the counters as the first left them, against float64."""
    format, companions = FORMATS[name], HANGING_ON[hanging]
    gated = companions.get("gated", False)
    num_rows = -(-num_rows // format.block[0]) * format.block[0] if gated else num_rows
    linear = make_linear(num_rows * (2 if gated else 1), num_columns, format, dtype, companions.get("bias", False))
    numbers, scales = rounded_rows(randn(num_tokens, num_columns), format.rounding or Rounding("fp8"))
    wide = torch.zeros(num_tokens, num_columns + 16, dtype=torch.float8_e4m3fn, device=DEVICE)
    wide[:, :num_columns] = numbers
    residual = randn(num_tokens, num_rows, dtype=dtype, seed=3) if "adds" in companions else None
    expected, workspace = oracle_of_rounded(numbers, scales, linear, gated, residual), make_linear_workspace(DEVICE)
    for x in (numbers, wide[:, :num_columns]):
        out = torch.full((num_tokens, num_rows + 8), float("nan"), dtype=dtype, device=DEVICE)
        given |= {"workspace": workspace, "gated": gated, "residual": residual}
        fp8_narrow_linear(x, scales, linear, out[:, :num_rows], **given)
        assert_close(out[:, :num_rows], expected)
        assert out[:, num_rows:].isnan().all()
    assert not workspace.arrivals.any()


@pytest.mark.one_in(3)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("hanging", HANGING_ON)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns", "shape"), TINY)
def test_equals_float64(
    num_tokens: int, num_rows: int, num_columns: int, shape: Fp8NarrowShape, name: str, hanging: str
) -> None:
    check(num_tokens, num_rows, num_columns, name, hanging, torch.float32, shape=shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns", "name", "hanging"), LARGE)
def test_tuned_shapes_equal_float64(num_tokens: int, num_rows: int, num_columns: int, name: str, hanging: str) -> None:
    check(num_tokens, num_rows, num_columns, name, hanging, torch.bfloat16, launch_pdl=True)


@pytest.mark.parametrize("name", FORMATS)
def test_the_rule_of_shapes(name: str) -> None:
    """Rows are split until there are programs enough; scratch memory holds the parts, shared memory the pipeline."""
    workspace_of_parts = len(make_linear_workspace(torch.device("cpu")).partials)
    for num_rows, num_columns in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 1024), (16, 64)):
        with torch.device("meta"):
            linear = Linear(torch.empty(num_rows, num_columns), format=FORMATS[name])
        for num_tokens in (2, 32, 33, 64, 65, 128, 256):
            shape = fp8_narrow_shape(num_tokens, linear)
            tiles = -(-num_rows // shape.rows) * -(-num_tokens // shape.tokens)
            assert tiles * shape.split >= 96 or num_columns // shape.split < 1024
            assert shape.block * shape.stages * (shape.rows + shape.tokens) <= 200 * 1024
            if num_tokens <= 128 and shape.split > 1:
                assert tiles * shape.split * shape.rows * shape.tokens <= workspace_of_parts


def test_a_small_workspace_is_not_overrun() -> None:
    """Then rows are not divided into so many parts."""
    linear = make_linear(64, 512, FORMATS["channel"], torch.float32, False)
    numbers, scales = rounded_rows(randn(20, 512), Rounding("fp8"))
    memory = torch.full((2 * 4 * 64 * 32,), float("nan"), device=DEVICE)
    workspace = LinearWorkspace(memory[: len(memory) // 2], torch.zeros(8, dtype=torch.int32).to(DEVICE))
    residual = randn(20, 64, seed=3)
    expected = oracle_of_rounded(numbers, scales, linear, False, residual)
    shape = Fp8NarrowShape(32, 32, 128, 8, 2, 1)
    assert (
        fp8_narrow_linear(numbers, scales, linear, residual, workspace=workspace, residual=residual, shape=shape)
        is residual
    )
    assert_close(residual, expected)
    assert memory[len(memory) // 2 :].isnan().all()


def test_refusals() -> None:
    workspace = make_linear_workspace(DEVICE)
    linear = make_linear(32, 256, FORMATS["channel"], torch.float32, False)
    numbers, scales = rounded_rows(randn(3, 256), Rounding("fp8"))
    with pytest.raises(ValueError, match="do not fit each other"):
        fp8_narrow_linear(numbers, torch.ones(3, 1), linear, torch.empty(3, 32), workspace=workspace)
    with pytest.raises(ValueError, match="not \\[3, 32\\]"):
        fp8_narrow_linear(numbers, scales, linear, torch.empty(3, 16), workspace=workspace)
    blocks = make_linear(32, 256, FORMATS["block"], torch.float32, False)
    with pytest.raises(ValueError, match="do not fit each other"):  # a block in both halves
        fp8_narrow_linear(
            *rounded_rows(randn(3, 256), Rounding("fp8", 128)), blocks, torch.empty(3, 16), workspace=workspace,
            gated=True,
        )  # fmt: skip
