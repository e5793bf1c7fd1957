"""A layer of multi-token prediction keeps the model's head once if it brings a copy of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_backend.models.mtp import kept_once
from paged_kernels.linear import PLAIN, Format, Linear

FORMATS = {"plain": PLAIN, "fp8": Format("fp8", (1, 0)), "int4": Format("int4", (1, 32))}


def head(format: Format) -> Linear:
    weight = torch.arange(128).reshape(4, 32).to(torch.bfloat16)
    if format.codes == "plain":
        return Linear(weight)
    weight = weight.to(torch.float8_e4m3fn) if format.codes == "fp8" else weight[:, :16].to(torch.uint8)
    return Linear(weight, format=format, scale=torch.full(format.scale_shape(4, 32), 0.5))


def copy_of(linear: Linear) -> Linear:
    scale = None if linear.scale is None else linear.scale.clone()
    return replace(linear, weight=linear.weight.clone(), scale=scale)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_copy_is_not_kept(format: Format) -> None:
    other = head(format)
    assert kept_once(copy_of(other), other) is other


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_other_numbers_are_kept(format: Format) -> None:
    other, own = head(format), copy_of(head(format))
    own.weight.view(torch.uint8)[3, 5] ^= 1
    assert kept_once(own, other) is own


@pytest.mark.parametrize("format", [FORMATS["fp8"], FORMATS["int4"]], ids=["fp8", "int4"])
def test_the_same_numbers_with_other_scales_are_kept(format: Format) -> None:
    other, own = head(format), copy_of(head(format))
    assert own.scale is not None
    own.scale[2] *= 2
    assert kept_once(own, other) is own


def test_what_is_stored_otherwise_is_kept() -> None:
    plain, quantised = head(PLAIN), head(FORMATS["fp8"])
    assert kept_once(plain, quantised) is plain
    assert kept_once(quantised, plain) is quantised
    with_bias = replace(copy_of(plain), bias=torch.zeros(4, dtype=torch.bfloat16))
    assert kept_once(with_bias, plain) is with_bias
    narrow = Linear(plain.weight[:2].clone())
    assert kept_once(narrow, plain) is narrow
