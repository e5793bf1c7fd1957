"""The chooser's products with quantised weights against the reference's, and the kernels of many tokens.

Of one token activations are not rounded, nor of few beside weights that are not multiplied in 8 bits: the 16-bit
type's own rounding is all. Where both round they may differ by a step of fp8 here and there.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paged_backend.models.weights import allocate_weights, load_weights
from paged_kernels import products, small_linear
from paged_kernels.block_linear import BlockShape, block_linear
from paged_kernels.codes import dequantise, quantise, round_activations
from paged_kernels.dequantise import dequantised
from paged_kernels.linear import Format, Linear, Rounding
from paged_kernels.norm_value import Norm
from paged_kernels.products import Products
from paged_kernels.reference import reference
from paged_kernels.round_rows import empty_scales, round_rows
from tests.kernels.test_cuda_ops import SMALL, use_kernels
from tests.kernels.test_quant_linear import FORMATS, make_linear, oracle, randn
from tests.oracle import random_prompts
from tests.published_formats import FORMATS as FORMATS_OF_PUBLISHERS
from tests.published_formats import save_published
from tests.runner_driver import Driver, load_runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = Format("fp8", (32, 128), Rounding("fp8", 128))


def rounded_rows(
    x: torch.Tensor, rounding: Rounding, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As round_rows, whose rounding the interpreter gets wrong, 1.97 to 1."""
    numbers, scales = round_activations(x, rounding, input_scale)
    return numbers.contiguous(), empty_scales(*scales.shape, x.device).copy_(scales)


def oracle_of_rounded(
    numbers: torch.Tensor, scales: torch.Tensor, linear: Linear, gated: bool, residual: torch.Tensor | None
) -> torch.Tensor:
    """In float64, of what the rounded numbers mean."""
    columns = numbers.shape[1]
    wide = (
        numbers.double() * scales.double().repeat_interleave(128 if linear.format.block[1] else columns, 1)[:, :columns]
    )
    return oracle(wide, linear, residual, gated)


def error_of(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def rounding_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the interpreter, which has fp8 rounded by torch then."""

    def normed_and_rounded(
        x: torch.Tensor, rounding: Rounding, input_scale: torch.Tensor | None, *, norm: Norm | None, launch_pdl: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rounded_rows(x if norm is None else reference.norm(x, norm), rounding, input_scale)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(products, "round_rows", normed_and_rounded)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("rounding_is_right")
@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [
        *itertools.product(("fp8-channel", "int4-g32-zeros", "nvfp4"), (1, 5, 70)),
        *itertools.product(("blocks", "blocks in both halves"), (1, 5, 260)),
    ],
)
def test_products_are_those_of_the_reference(name: str, num_tokens: int) -> None:
    format = {"blocks": BLOCKS, "blocks in both halves": replace(BLOCKS, block=(64, 128))}.get(name) or FORMATS[name]
    linear = make_linear(64, 256, format, torch.float16, bias=True)
    x, norm = randn(num_tokens, 256, dtype=torch.float16), Norm(randn(256, dtype=torch.float16, seed=5), 1e-5)
    meant = linear if num_tokens > 1 else replace(linear, format=replace(format, rounding=None))
    # a row of 256 has some numbers on the edge between two of fp8
    tolerance = 2e-3 if meant.format.rounding is None else 1e-2
    chooser = Products(DEVICE)
    plain = reference.linear(reference.norm(x, norm), meant)
    assert error_of(chooser(x, linear, norm_before=norm), plain) < tolerance
    gated, out = reference.gate(plain, "silu"), torch.empty(num_tokens, 32, dtype=torch.float16, device=DEVICE)
    assert error_of(chooser(x, linear, norm_before=norm, gated=True), gated) < tolerance
    assert chooser(x, linear, norm_before=norm, gated=True, out=out) is out
    assert error_of(out, gated) < tolerance
    residual = randn(num_tokens, 64, dtype=torch.float16, seed=6)
    expected = residual + reference.linear(x, meant)
    assert chooser(x, linear, residual=residual) is residual
    assert error_of(residual, expected) < tolerance


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("rounding_is_right")
@pytest.mark.parametrize("static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("num_tokens", [20, 70, pytest.param(2048, marks=pytest.mark.gpu)])
def test_tokens_times_weights_with_a_scale_a_row_are_those_of_the_reference(
    num_tokens: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few by fp8_narrow.py, many by cuBLASLt: 8-bit tensor cores, scales of tokens and of rows."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(products, "_has_fp8_product", lambda x, linear: True)
    format = Format("fp8", rounding=Rounding("fp8", static=static))
    linear = make_linear(1024, 2048, format, torch.bfloat16, bias=True)
    if linear.input_scale is not None:
        linear.input_scale.fill_(0.02)
    x, norm = randn(num_tokens, 2048, dtype=torch.bfloat16), Norm(randn(2048, dtype=torch.bfloat16, seed=5), 1e-5)
    chooser, residual = Products(DEVICE), randn(num_tokens, 1024, dtype=torch.bfloat16, seed=6)
    plain = reference.linear(reference.norm(x, norm), linear)
    assert error_of(chooser(x, linear, norm_before=norm), plain) < 1e-2
    assert error_of(chooser(x, linear, norm_before=norm, gated=True), reference.gate(plain, "silu")) < 1.5e-2
    expected = residual + reference.linear(x, linear)
    assert error_of(chooser(x, linear, residual=residual), expected) < 1e-2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("gated", [False, True], ids=["residual", "gate"])
@pytest.mark.parametrize("block_rows", [16, 32])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            BlockShape(16, 16, 2, 1),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU"),
        ),
        pytest.param(None, marks=pytest.mark.gpu),
    ],
    ids=["tiny", "tuned"],
)
def test_blocks_are_scaled_after_each_group(shape: BlockShape | None, block_rows: int, gated: bool) -> None:
    tokens, rows, columns = (37, 96 if gated else 100, 200) if shape else (300, 1024 if gated else 1000, 4096)
    dtype = torch.float32 if shape else torch.bfloat16
    linear = replace(
        quantise(
            randn(2 * rows if gated else rows, columns, scale=0.1, seed=1),
            Format("fp8", (block_rows if shape else 4 * block_rows, 128)),
        ),
        bias=randn(2 * rows if gated else rows, dtype=dtype, seed=2),
    )
    numbers, scales = rounded_rows(randn(tokens, columns), Rounding("fp8", 128))
    residual = None if gated else randn(tokens, rows, dtype=dtype, seed=3)
    expected = oracle_of_rounded(numbers, scales, linear, gated, residual)
    out = torch.full((tokens, rows), float("nan"), dtype=dtype, device=DEVICE)
    assert block_linear(numbers, scales, linear, out, gated=gated, residual=residual, shape=shape) is out
    assert error_of(out, expected) < (1e-6 if shape else 4e-3)


@pytest.mark.parametrize(
    "rounding",
    [Rounding("fp8"), Rounding("fp8", 128, power_of_two=True), Rounding("fp8", static=True)],
    ids=["token", "group", "static"],
)
def test_rounded_rows_are_those_of_the_reference(rounding: Rounding) -> None:
    x, norm, scale = randn(3, 200), Norm(randn(200, seed=1), 1e-5), torch.full((1,), 0.01, device=DEVICE)
    numbers, scales = round_rows(x, rounding, scale, norm=norm)
    expected, expected_scales = round_activations(reference.norm(x, norm), rounding, scale)
    assert torch.allclose(scales, expected_scales, rtol=1e-6)
    assert numbers.shape == expected.shape and numbers.dtype == expected.dtype
    if DEVICE.type == "cuda":  # the interpreter rounds to fp8 wrongly, 1.97 to 1
        assert float((numbers.float() != expected.float()).float().mean()) < 0.01  # on an edge between two numbers
        assert torch.allclose(numbers.float(), expected.float(), rtol=0.13)  # by one step there
    assert bool((numbers.float().abs() <= expected.float().abs() * 1.13 + 2.0**-9).all())


@pytest.mark.gpu
def test_what_is_no_number_stays_none_when_it_is_rounded() -> None:
    x = randn(3, 256, dtype=torch.bfloat16)
    x[1, 5], x[2] = float("nan"), float("inf")
    for rounding in (Rounding("fp8"), Rounding("fp8", 128), Rounding("fp8", static=True)):
        numbers, scales = round_rows(x, rounding, torch.full((1,), 0.01, device=DEVICE))
        assert numbers[1].isnan().nonzero().flatten().tolist() == [5] and not numbers[0].isnan().any()
        assert rounding.static or numbers[2].isnan().all()
        assert bool(scales[:2].isfinite().all())


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_weights_are_what_the_reference_says(name: str) -> None:
    linear = make_linear(16, 256, FORMATS[name], torch.float32, bias=False)
    assert torch.allclose(dequantised(linear, torch.float32), dequantise(linear), rtol=1e-6)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_a_decoder_whose_weights_stay_as_they_are_stored_answers_as_a_model_of_what_they_mean(tmp_path: Path) -> None:
    """Steps of one token and of several, by the kernels."""
    truth = save_published(tmp_path, FORMATS_OF_PUBLISHERS["awq-g32"], **{**SMALL, "intermediate_size": 64})
    runner = load_runner(
        tmp_path, page_size=4, num_pages=64, max_model_len=64, max_num_sequences=4, max_batched_tokens=64
    )
    assert runner.architecture.quantization is not None
    kept = replace(runner.architecture, quantization=replace(runner.architecture.quantization, dequantised=False))
    weights = allocate_weights(kept, torch.float32, torch.device("cpu"))
    load_weights(weights, tmp_path, lambda sentence: None)
    assert {linear.format.codes for linear in weights.linears} == {"int4"}
    runner._decoder._weights = weights
    use_kernels(runner)
    prompts = random_prompts((1, 9))
    assert Driver(runner, num_rows=4).generate(prompts, 3, chunk=6, arrive_every=1) == truth.greedy(prompts, 3)


def test_refusals() -> None:
    linear: Linear = quantise(randn(8, 128), Format("fp8"))
    numbers, scales = rounded_rows(randn(3, 128), Rounding("fp8", 128))
    with pytest.raises(ValueError, match="do not fit each other"):
        block_linear(numbers, scales, linear, torch.empty(3, 8))
    with pytest.raises(ValueError, match="not \\[3, 16\\]"):
        block_linear(numbers, scales, quantise(randn(16, 128), Format("fp8", (16, 128))), torch.empty(3, 8))
    with pytest.raises(ValueError, match="cannot be rounded"):
        round_rows(randn(3, 8), Rounding("int8"))
    with pytest.raises(ValueError, match="plain RMS norm"):
        round_rows(randn(3, 8), Rounding("fp8"), norm=Norm(randn(8), 1e-5, plus_one=True))
    with pytest.raises(ValueError, match="is not read"):
        dequantised(quantise(randn(4, 96), Format("int4", (1, 48))), torch.float32)


def test_the_product_of_one_token_waits_for_a_weight_that_is_dequantised_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vector_linear as a programmatic dependent reads its weight before the launches ahead are complete: here those
    that make the weight.
    """
    linear, x = (
        make_linear(8, 96, Format("int4", (1, 48), zeros=True), torch.float16, bias=True),
        randn(1, 96, dtype=torch.float16),
    )
    chooser, vector_linear, dependent = Products(DEVICE), small_linear.vector_linear, []

    def watched(*arguments: Any, launch_pdl: bool = False, **options: Any) -> torch.Tensor:
        dependent.append(launch_pdl)
        return vector_linear(*arguments, **options)

    monkeypatch.setattr(chooser, "_pdl", True)
    monkeypatch.setattr(small_linear, "vector_linear", watched)
    assert error_of(chooser(x, linear), reference.linear(x, linear)) < 2e-3
    assert dependent == [False]
