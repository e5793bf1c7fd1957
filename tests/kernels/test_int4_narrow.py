"""Products of few tokens with weights of int4 in quads, against float64 products of what the weights mean."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from paged_kernels.codes import dequantise
from paged_kernels.dequantise import dequantised
from paged_kernels.int4_narrow import Int4NarrowShape, int4_narrow_linear, int4_narrow_shape
from paged_kernels.linear import Format, Linear
from paged_kernels.quads import pack_quads, unpack_quads
from paged_kernels.small_linear import LinearWorkspace, make_linear_workspace
from tests.kernels.test_quant_linear import assert_close, make_linear, oracle, randn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "g128": Format("int4", (1, 128), scale_dtype=torch.float16, order="quads"),
    "g128 zeros": Format("int4", (1, 128), zeros=True, scale_dtype=torch.bfloat16, order="quads"),
    "g256 zeros": Format("int4", (1, 256), zeros=True, order="quads"),
    "channel": Format("int4", order="quads"),
    "channel zeros": Format("int4", zeros=True, order="quads"),
}
HANGING_ON = {"nothing": {}, "bias": {"bias": True}, "gate": {"gated": True, "bias": True}, "residual": {"adds": True}}
TINY = [
    (1, 32, 256, Int4NarrowShape(32, 16, 1, 2, 1)),
    (17, 64, 512, Int4NarrowShape(16, 32, 4, 3, 1)),
    (20, 20, 768, Int4NarrowShape(32, 16, 2, 2, 1)),  # ragged rows, two tiles of tokens
    (5, 48, 1280, Int4NarrowShape(32, 16, 4, 2, 1)),  # the last of the parts has less
]
LARGE = list(
    itertools.product(
        (1, 2, 16, 17, 33, 64, 65, 128, 129, 256),
        ((1000, 1024, "g128", "bias"), (4096, 14336, "g128 zeros", "residual"), (14336, 4096, "g128", "gate")),
    )
) + [
    (7, (4096, 4096, "channel", "residual")),
    (50, (6144, 4096, "channel zeros", "nothing")),
    (40, (1024, 3840, "g256 zeros", "gate")),
]


def check(
    num_tokens: int, num_rows: int, num_columns: int, name: str, hanging: str, dtype: torch.dtype, **given: Any
) -> None:
    """A product and once more, of rows that lie apart, which finds the counters as the first left them."""
    companions = HANGING_ON[hanging]
    gated = companions.get("gated", False)
    linear = make_linear(
        num_rows * (2 if gated else 1), num_columns, FORMATS[name], dtype, companions.get("bias", False)
    )
    x = randn(num_tokens, num_columns, dtype=dtype)
    wide = torch.full((num_tokens, num_columns + 16), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :num_columns] = x
    residual = randn(num_tokens, num_rows, dtype=dtype, seed=3) if "adds" in companions else None
    expected, workspace = oracle(x, linear, residual, gated), make_linear_workspace(DEVICE)
    for values in (x, wide[:, :num_columns]):
        out = torch.full((num_tokens, num_rows + 8), float("nan"), dtype=dtype, device=DEVICE)
        given |= {"workspace": workspace, "gated": gated, "residual": residual}
        int4_narrow_linear(values, linear, out=out[:, :num_rows], **given)
        assert_close(out[:, :num_rows], expected)
        assert out[:, num_rows:].isnan().all()
    assert not workspace.arrivals.any()


@pytest.mark.one_in(3)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
@pytest.mark.parametrize(
    ("name", "hanging"),
    [*itertools.product(("g128", "g128 zeros"), HANGING_ON), *itertools.product(list(FORMATS)[2:], ["gate"])],
)
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns", "shape"), TINY)
def test_equals_float64(
    num_tokens: int, num_rows: int, num_columns: int, shape: Int4NarrowShape, name: str, hanging: str
) -> None:
    check(num_tokens, num_rows, num_columns, name, hanging, torch.float32, shape=shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "matrix"), LARGE)
def test_tuned_shapes_equal_float64(num_tokens: int, matrix: tuple[int, int, str, str], dtype: torch.dtype) -> None:
    check(num_tokens, *matrix, dtype, launch_pdl=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dequantised_weight_is_what_it_means(name: str, dtype: torch.dtype) -> None:
    linear = make_linear(40, 768, FORMATS[name], dtype, bias=False)
    # the interpreter cuts off what does not fit bfloat16
    tolerance = 2.0**-7 if DEVICE.type == "cpu" and dtype == torch.bfloat16 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        dequantised(linear, dtype).float(), dequantise(linear), rtol=tolerance, atol=tolerance * 1e-3
    )


def test_numbers_in_quads_lie_where_tensor_cores_want_them() -> None:
    """Thread q of a quad has, of 16 columns, columns 2 q, 2 q + 1, and those eight further on; words lie as threads."""
    numbers = torch.arange(128, dtype=torch.int32)
    for bits in range(2):  # a column's number has seven bits, a nibble four
        packed = pack_quads(((numbers >> (4 * bits)) & 15).to(torch.uint8)[None])
        words = packed.view(torch.int32).tolist()[0][0]
        for q, p, i, e in itertools.product(range(4), range(4), range(4), range(2)):
            column = 32 * p + 8 * i + 2 * q + e
            assert words[4 * q + p] >> (16 * e + 4 * i) & 15 == column >> (4 * bits) & 15
    assert packed.shape == (1, 1, 64)
    every = torch.randint(0, 16, (5, 384), dtype=torch.uint8)
    assert unpack_quads(pack_quads(every)).equal(every)


def test_the_rule_of_shapes() -> None:
    """Rows are split until there are programs enough; scratch memory holds the parts, shared memory the pipeline."""
    room = len(make_linear_workspace(torch.device("cpu")).partials)
    for num_rows, num_columns in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 1024), (16, 128)):
        with torch.device("meta"):
            linear = Linear(torch.empty(num_rows, num_columns // 128, 64), format=FORMATS["g128"])
        for num_tokens in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256):
            shape = int4_narrow_shape(num_tokens, linear)
            tiles = -(-num_rows // shape.rows) * -(-num_tokens // shape.tokens)
            assert tiles * shape.split >= 192 or num_columns // shape.split < 1024
            assert shape.split == 1 or num_columns // shape.split >= 512
            assert shape.stages * shape.together * (64 * shape.rows + 256 * shape.tokens) <= 200 * 1024
            assert shape.split == 1 or tiles * shape.split * shape.rows * shape.tokens <= room


def test_tiles_of_float32_are_small() -> None:
    """No tensor core multiplies them: what a thread has to do for a block of columns is written out for the compiler,
    which takes minutes for a tile of 64 rows times 128 tokens, and puts 15 KB of its sums into memory.
    """
    linear = make_linear(4096, 256, FORMATS["g128"], torch.float32, False)
    for num_tokens in (1, 17, 256):
        shape = int4_narrow_shape(num_tokens, linear, torch.float32)
        assert shape.rows * shape.tokens * 128 // (32 * shape.num_warps) <= 256


def test_a_small_workspace_is_not_overrun() -> None:
    """Then rows are not divided into so many parts."""
    linear = make_linear(64, 1024, FORMATS["g128"], torch.float32, False)
    x = randn(20, 1024)
    memory = torch.full((2 * 4 * 64 * 32,), float("nan"), device=DEVICE)
    workspace = LinearWorkspace(memory[: len(memory) // 2], torch.zeros(8, dtype=torch.int32).to(DEVICE))
    residual = randn(20, 64, seed=3)
    expected = oracle(x, linear, residual, gated=False)
    shape = Int4NarrowShape(32, 32, 8, 2, 1)
    assert int4_narrow_linear(x, linear, out=residual, workspace=workspace, residual=residual, shape=shape) is residual
    assert_close(residual, expected)
    assert memory[len(memory) // 2 :].isnan().all()


def test_refusals() -> None:
    workspace = make_linear_workspace(DEVICE)
    linear = make_linear(32, 256, FORMATS["g128"], torch.float32, False)
    with pytest.raises(ValueError, match="do not fit each other"):
        int4_narrow_linear(randn(3, 128), linear, workspace=workspace)
    with pytest.raises(ValueError, match="1 to 256 tokens"):
        int4_narrow_linear(randn(257, 256), linear, workspace=workspace)
    with pytest.raises(ValueError, match="not \\[3, 32\\]"):
        int4_narrow_linear(randn(3, 256), linear, out=torch.empty(3, 16), workspace=workspace)
    with pytest.raises(ValueError, match="bias of x's dtype"):
        int4_narrow_linear(randn(3, 256), replace(linear, bias=torch.ones(32).half()), workspace=workspace)
    halves = make_linear(32, 256, replace(FORMATS["g128"], order="halves"), torch.float32, False)
    for other in (halves, linear.rows(0, 16)):
        with pytest.raises(ValueError, match="not in quads, and whole"):
            int4_narrow_linear(randn(3, 256), other, workspace=workspace)


def test_parts_of_a_linear_mean_parts_of_its_matrix() -> None:
    linear = make_linear(24, 768, FORMATS["g256 zeros"], torch.float32, True)
    whole = dequantise(linear)
    assert dequantise(linear.rows(8, 24)).equal(whole[8:])
    assert dequantise(linear.columns(256, 768)).equal(whole[:, 256:])
    with pytest.raises(ValueError, match="columns 128 to 768 are not whole groups of 256"):
        linear.columns(128, 768)
