"""Experts of MXFP4 in words: what is stored means what was given, rows are split without loss, and products in bfloat16
equal those written out in float64.
"""

from __future__ import annotations

import pytest
import torch

from paged_kernels.codes import dequantise
from paged_kernels.e2m1 import MXFP4_GROUP as GROUP
from paged_kernels.e2m1 import codes_of_e2m1, numbers_of_e2m1
from paged_kernels.expert_routing import make_arrivals, norm_route_one
from paged_kernels.expert_tiles import WordsShape
from paged_kernels.expert_words import add_experts_in_words, empty_values, split_rows
from paged_kernels.experts import MXFP4, Gate, Routing
from paged_kernels.linear import WORDS_BLOCK as BLOCK
from paged_kernels.linear import empty_linear
from paged_kernels.words import MOST_STEPS, fill_words, pack_words, unpack_words
from tests.expert_cases import expert_layer, on, quantised, written_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLAMPED = Gate(limit=0.5, alpha=1.702, interleaved=True)
# the interpreter cuts off what bfloat16 has no room for, a card rounds: half of it on the average
TOLERANCE = 6e-3 if DEVICE.type == "cuda" else 1.2e-2


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_numbers_of_four_bits_are_coded_and_found_again() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    numbers = numbers_of_e2m1(codes)
    assert numbers[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert torch.equal(numbers[8:], -numbers[:8])
    again = codes_of_e2m1(numbers)
    assert torch.equal(again[again != 0], codes[(codes & 7) != 0])  # 0 has one sign
    assert codes_of_e2m1(torch.tensor([0.2, 0.3, 5.1, -7.0])).tolist() == [0, 1, 7, 15]


@pytest.mark.parametrize("num_columns", [32, 128, 160, 256])
def test_words_hold_what_was_packed(num_columns: int) -> None:
    codes = random_codes(5, num_columns)
    packed = pack_words(codes)
    assert packed.shape == (5, -(-num_columns // BLOCK) * BLOCK // 2)
    assert torch.equal(unpack_words(packed, num_columns), codes)


def test_each_number_lies_where_the_tensor_cores_want_it() -> None:
    """Column 32 i + 16 h + 4 q + e: in word 4 q + i, its magnitude in three bits from 16 h + 4 e on, its sign in bit
    8 e + 7 - 4 h; 64 bytes of a row, then those of the next.
    """
    for column in (0, 1, 3, 4, 16, 31, 37, 97, 127):
        i, h, q, e = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        codes = torch.zeros(2, 2 * BLOCK, dtype=torch.uint8)
        codes[1, BLOCK + column] = 0b1101
        words = pack_words(codes).view(torch.int32).flatten()
        at = 16 * 2 + 16 + 4 * q + i  # second block, second row
        expected = (5 << (16 * h + 4 * e)) | (1 << (8 * e + 7 - 4 * h))
        assert words.nonzero().tolist() == [[at]]
        assert int(words[at]) & 0xFFFFFFFF == expected


def test_numbers_and_exponents_as_they_are_published_are_stored_exactly() -> None:
    rows, columns = 6, 160
    codes = random_codes(rows, columns)
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(110, 110 + MOST_STEPS + 1, (rows, columns // GROUP), generator=generator).to(torch.uint8)
    exponents[0] = torch.tensor([250, 248, 250, 239, 239])
    exponents[1] = 0
    codes[2, :GROUP] &= 8  # zeros of both signs, whose exponent says nothing
    exponents[2, 0] = 3
    linear = empty_linear(rows, columns, MXFP4, torch.bfloat16, torch.device("cpu"))
    fill_words(linear, codes, exponents)
    expected = numbers_of_e2m1(codes).double() * (exponents.double() - 127).exp2().repeat_interleave(GROUP, 1)
    assert torch.equal(dequantise(linear).double(), expected)


def test_groups_that_are_far_smaller_than_others_of_their_row_are_rounded() -> None:
    codes = random_codes(4, 96)
    exponents = torch.full((4, 3), 120, dtype=torch.uint8)
    exponents[:, 1] = 120 - MOST_STEPS - 1
    exponents[:, 2] = 60
    linear = empty_linear(4, 96, MXFP4, torch.bfloat16, torch.device("cpu"))
    fill_words(linear, codes, exponents)
    given = numbers_of_e2m1(codes) * (exponents.float() - 127).exp2().repeat_interleave(GROUP, 1)
    found, largest = dequantise(linear), 2.0 ** (120 - 127)
    assert torch.equal(found[:, :GROUP], given[:, :GROUP])
    assert 0 < float((found - given).abs().max()) <= 2.0**-13 * largest
    assert float(found[:, 2 * GROUP :].abs().max()) == 0


def split_and_added(x: torch.Tensor) -> torch.Tensor:
    """float32 on the CPU."""
    values, scales = split_rows(x.to(DEVICE))
    assert values.shape == (len(x), 2, -(-x.shape[1] // BLOCK) * BLOCK)
    assert bool((values[:, :, x.shape[1] :].float() == 0).all())
    return values.float().cpu().sum(1)[:, : x.shape[1]] * scales.cpu()[:, None]


def assert_parts_add_up(x: torch.Tensor) -> None:
    """Of numbers below 2 ** -9 of the greatest the parts are multiples of 2 ** -16 of its power of two, or less."""
    wide, error = x.float(), (split_and_added(x) - x.float()).abs()
    greatest = wide.abs().amax(1, keepdim=True)
    assert bool((error < 2.0**-16 * greatest)[greatest[:, 0] > 0].all())
    assert bool((error[wide.abs() >= 2.0**-9 * greatest] == 0).all())


def test_a_linear_in_words_is_not_divided() -> None:
    """Its rows do not lie one after another."""
    linear = empty_linear(4, 256, MXFP4, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="in words cannot be divided"):
        linear.rows(0, 2)
    with pytest.raises(ValueError, match="in words cannot be divided"):
        linear.columns(0, 128)


@pytest.mark.parametrize("size", [32, 128, 200])
def test_a_row_is_the_sum_of_its_parts(size: int) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0
    x[4] = 2.0 ** -torch.arange(size).clamp(max=40)
    assert_parts_add_up(x)


@pytest.mark.parametrize("greatest", [1.0, 1 + 2.0**-7, 2 - 2.0**-7])
def test_every_number_of_8_significant_bits_is_the_sum_of_its_parts(greatest: float) -> None:
    """A row for each exponent."""
    mantissas, exponents = 1 + torch.arange(128) / 128, -torch.arange(20.0)
    rows = (mantissas * exponents.exp2()[:, None]).clamp(max=greatest)
    assert_parts_add_up(torch.cat((torch.full((20, 1), greatest), rows, -rows), 1).bfloat16())


@pytest.mark.parametrize("exponent", [127, 101, -101, -119])
def test_rows_of_any_size_are_the_sums_of_their_parts(exponent: int) -> None:
    x = torch.tensor([[1.0, -0.5, 2 - 2.0**-7, 2.0**-7], [-1.0, 0.0, 1.0, 1.5]]) * 2.0**exponent
    assert torch.equal(split_and_added(x.bfloat16()), x)


def test_a_row_with_a_number_that_is_not_finite_has_no_scale() -> None:
    x = torch.ones(3, 32, dtype=torch.bfloat16, device=DEVICE)
    x[0, 3], x[2, 4] = float("inf"), float("nan")
    assert split_rows(x)[1].isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("broken", [False, True])
def test_the_launch_that_norms_a_lone_token_leaves_both_parts_of_it(broken: bool) -> None:
    """Bit by bit what a launch of their own makes of the norm; 160 numbers are stored as 256."""
    experts = on(expert_layer(8, 160, 96, Routing(3, "softmax"), Gate(), bias=False, dtype=torch.bfloat16), DEVICE)
    generator = torch.Generator().manual_seed(1)
    x, norm = (torch.randn(size, generator=generator).to(DEVICE, torch.bfloat16) for size in ((1, 160), (160,)))
    if broken:
        x[0, 3] = float("nan")
    parts, scales = halves = empty_values(1, 160, DEVICE)
    parts.view(torch.uint8).fill_(0x7F), scales.fill_(-1.0)
    arrivals = make_arrivals(DEVICE)
    normed, _, _ = norm_route_one(x, norm, 1e-5, experts, arrivals=arrivals, halves=halves)
    expected, expected_scales = split_rows(normed)
    torch.testing.assert_close(scales, expected_scales, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(parts.view(torch.uint8), expected.view(torch.uint8)) or broken


SHAPES = {
    "side by side": WordsShape(16, 64, 2, 1, 1, parts=2),
    "one after the other": WordsShape(64, 64, 2, 1, 1),
}


# a bias is added to what a gate takes, and to no number in words: a gate has one or none in CI, the other with -m long
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("gate", "bias"),
    [
        pytest.param(gate, bias, id=f"{name}-{bias}", marks=() if bias == in_ci else pytest.mark.long)
        for name, gate, in_ci in (
            ("clamped", CLAMPED, True),
            ("plain", Gate(), False),
            ("one", Gate(activation="relu2", gated=False), True),
        )
        for bias in (False, True)
    ],
)
@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [(1, SHAPES["side by side"]), *((40, shape) for shape in SHAPES.values())],
    ids=["one token, in parts", *SHAPES],
)  # fmt: skip
def test_products_in_bfloat16_equal_those_of_float64(
    num_tokens: int, shape: WordsShape, gate: Gate, bias: bool
) -> None:
    """Rows of 160 numbers are stored as 256, and the last 64 rows of a matrix are not all there; 40 tokens that choose
    2 of 3 experts fill tiles of 16 and leave some.
    """
    plain = expert_layer(3, 160, 96, Routing(2, "softmax"), gate, bias=bias, dtype=torch.bfloat16)
    experts = on(quantised(plain, MXFP4), DEVICE)
    generator = torch.Generator().manual_seed(num_tokens)
    x, residual = (torch.randn(num_tokens, 160, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    x[0, 7] = 40.0
    expert_ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(num_tokens)])
    expert_ids = expert_ids.to(DEVICE, torch.int32)
    weights = torch.rand(num_tokens, 2, generator=generator).to(DEVICE) + 0.1
    expected = residual.double().cpu()
    expected += written_out(x.cpu(), expert_ids, weights, on(experts, torch.device("cpu")))
    found = add_experts_in_words(x, expert_ids, weights, experts, residual.clone(), shapes=(shape, shape))
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative RMS error {error:.2e}"


@pytest.mark.gpu
def test_a_device_without_8_bit_tensor_cores_multiplies_bfloat16_as_it_is() -> None:
    """The interpreter has no products in bfloat16."""
    plain = expert_layer(3, 96, 96, Routing(2, "softmax"), CLAMPED, bias=True, dtype=torch.bfloat16)
    experts = on(quantised(plain, MXFP4), DEVICE)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(5)).to(DEVICE, torch.bfloat16)
    expert_ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]], dtype=torch.int32, device=DEVICE)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    expected = written_out(x.cpu(), expert_ids, weights, on(experts, torch.device("cpu")))
    given = x, expert_ids, weights, experts, torch.zeros_like(x)
    found = add_experts_in_words(*given, shapes=(SHAPES["side by side"],) * 2, by_fp8=False)
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative RMS error {error:.2e}"


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_number_that_is_none_stays_with_its_token(num_tokens: int) -> None:
    plain = expert_layer(3, 32, 32, Routing(2, "softmax"), CLAMPED, bias=True, dtype=torch.bfloat16)
    experts = on(quantised(plain, MXFP4), DEVICE)
    x, residual = torch.randn(2, num_tokens, 32).to(DEVICE, torch.bfloat16)
    x[0, 5] = float("nan")
    expert_ids = torch.tensor([[0, 2]] * num_tokens, dtype=torch.int32, device=DEVICE)
    weights = torch.full((num_tokens, 2), 0.5, device=DEVICE)
    found = add_experts_in_words(x, expert_ids, weights, experts, residual, shapes=(SHAPES["side by side"],) * 2)
    assert bool(found[0].isnan().all())
    assert bool(found[1:].isfinite().all())
