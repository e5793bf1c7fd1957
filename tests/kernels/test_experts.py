"""Kernels of a layer of experts, over ragged routing, against the twins in plain torch and sums written out in
float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_kernels.expert_kernels import ExpertKernels
from paged_kernels.expert_products import add_experts
from paged_kernels.expert_routing import make_arrivals, norm_route_one, route
from paged_kernels.expert_tiles import ProductShape, WordsShape
from paged_kernels.expert_vectors import add_experts_of_one
from paged_kernels.expert_words import add_experts_in_words
from paged_kernels.experts import MXFP4, Experts, Gate, Routing
from paged_kernels.linear import PLAIN, Format
from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference
from tests.expert_cases import SMALL_FORMATS, expert_layer, on, quantised, routing_cases, written_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# an expert's gated vector and answer are rounded once each, and their sum
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 3e-6}
SWIGLU, CLAMPED = Gate(), Gate(limit=0.5, alpha=1.702, interleaved=True)
GEGLU, RELU2 = Gate(activation="gelu_tanh"), Gate(activation="relu2", gated=False)
GATES = {"swiglu": (SWIGLU, False), "clamped and bias": (CLAMPED, True), "geglu and bias": (GEGLU, True)}
GATES |= {"gelu": (Gate(activation="gelu"), False), "relu2": (RELU2, False), "relu2 and bias": (RELU2, True)}
GATES |= {"gated relu2": (Gate(activation="relu2"), False)}
HIDDEN, SIZE, EXPERTS, TOP_K = 32, 32, 8, 3
FEW = Routing(TOP_K, "softmax", renormalised=True)
TILE = ProductShape(tokens=16, rows=16, block=32, stages=2, num_warps=1)


def tokens(count: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(
    routing: Routing = FEW,
    gate: Gate = SWIGLU,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Experts:
    experts = expert_layer(
        EXPERTS, HIDDEN, SIZE, routing, gate, bias=bias, correction=routing.scores == "sigmoid", dtype=dtype
    )
    return on(experts, DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (found.double().cpu() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[found.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


def choice(kind: str, num_tokens: int, top_k: int = TOP_K, num_experts: int = EXPERTS) -> torch.Tensor:
    """int32 [T, k]: experts of tokens, at random, the same for all, or all but some."""
    generator = torch.Generator().manual_seed(num_tokens)
    few = {"spread": num_experts, "the same for all": top_k, "some get none": top_k + 1}[kind]
    shift = 0 if kind == "spread" else num_experts - few
    drawn = torch.stack([torch.randperm(few, generator=generator)[:top_k] for _ in range(num_tokens)]) + shift
    return drawn.to(DEVICE, torch.int32)


def weights_of(expert_ids: torch.Tensor) -> torch.Tensor:
    return torch.rand(expert_ids.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) + 0.1


@pytest.mark.parametrize("num_tokens", [1, 21])
@pytest.mark.parametrize("routing", routing_cases(EXPERTS).values(), ids=routing_cases(EXPERTS))
def test_the_same_experts_are_chosen_with_the_same_weights(routing: Routing, num_tokens: int) -> None:
    experts, x, arrivals = layer(routing), tokens(num_tokens), make_arrivals(DEVICE)
    expected_ids, expected = reference.route(x, experts)
    for _ in range(2):  # the second launch finds the counters as the first left them
        expert_ids, weights = route(x, experts, arrivals=arrivals)
        assert torch.equal(expert_ids, expected_ids)
        torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)
    assert not arrivals.any()


@pytest.mark.parametrize("num_tokens", [3, 300])
def test_columns_of_a_wide_router_are_shared_out_among_few_tokens(num_tokens: int) -> None:
    """Ranges of 512 columns, the last one of 40; those of many tokens are summed up by one program."""
    experts = on(expert_layer(EXPERTS, 1064, 16, FEW, SWIGLU, bias=True), DEVICE)
    x, arrivals = tokens(num_tokens, 1064), make_arrivals(DEVICE)
    expected_ids, expected = reference.route(x, experts)
    expert_ids, weights = route(x, experts, arrivals=arrivals)
    assert torch.equal(expert_ids, expected_ids) and not arrivals.any()
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("routing", routing_cases(EXPERTS).values(), ids=routing_cases(EXPERTS))
def test_a_lone_token_is_normed_on_the_way_to_the_router(routing: Routing) -> None:
    experts, x, arrivals = layer(routing), tokens(1), make_arrivals(DEVICE)
    norm = tokens(1, seed=9)[0].abs() + 0.5
    normed, expert_ids, weights = norm_route_one(x, norm, 1e-5, experts, arrivals=arrivals)
    torch.testing.assert_close(normed, reference.norm(x, Norm(norm, 1e-5)), rtol=1e-5, atol=1e-6)
    expected_ids, expected = reference.route(normed, experts)
    assert torch.equal(expert_ids, expected_ids) and not arrivals.any()
    torch.testing.assert_close(weights, expected, rtol=2e-5, atol=1e-7)


# who is chosen matters to no gate: uneven groups of most gates wait for -m long
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("kind", "gate", "bias"),
    [
        pytest.param(
            kind,
            *gate,
            id=f"{kind}-{name}",
            marks=() if kind == "spread" or name in ("swiglu", "relu2") else pytest.mark.long,
        )
        for kind in ("spread", "the same for all", "some get none")
        for name, gate in GATES.items()
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_products_of_ragged_groups_equal_float64(num_tokens: int, kind: str, gate: Gate, bias: bool) -> None:
    experts, x, residual = layer(gate=gate, bias=bias), tokens(num_tokens), tokens(num_tokens, seed=6)
    expert_ids = choice(kind, num_tokens)
    weights = weights_of(expert_ids)
    expected = residual.double().cpu() + written_out(x.cpu(), expert_ids, weights, on(experts, torch.device("cpu")))
    found = add_experts(x, expert_ids, weights, experts, residual.clone(), shape=TILE, num_programs=3)
    assert_close(found, expected)
    if num_tokens == 1:
        assert_close(add_experts_of_one(x, expert_ids, weights, experts, residual.clone()), expected)


@pytest.mark.one_in(2)
# what is made of a product matters to no format: in CI each has one token or seven, and experts of one matrix only some
@pytest.mark.parametrize(
    ("format", "num_tokens", "gate", "bias"),
    [
        pytest.param(
            format,
            num_tokens,
            gate,
            bias,
            id=f"{case}-{name}",
            marks=()
            if (num_tokens == 1) == (place % 2 == 0) and (gate.gated or name in ("int4 group 32, zeros", "nvfp4"))
            else pytest.mark.long,
        )
        for place, (name, format) in enumerate(SMALL_FORMATS.items())
        for case, num_tokens, gate, bias in (
            ("one, swiglu", 1, SWIGLU, False),
            ("7, clamped and bias", 7, CLAMPED, True),
            ("one, relu2 and bias", 1, RELU2, True),
            ("7, relu2", 7, RELU2, False),
        )
    ],
)
def test_products_with_packed_weights_equal_those_with_their_numbers(
    num_tokens: int, format: Format, gate: Gate, bias: bool
) -> None:
    """Rows of 80 or 96 numbers are no whole number of tiles."""
    wide = 64 if format.block[1] == 64 else 80 if format.block[1] == 16 else 96
    experts = expert_layer(5, wide, wide, FEW, gate, bias=bias, dtype=torch.float16)
    experts = on(quantised(experts, format), DEVICE)
    x, residual = (tokens(num_tokens, wide, torch.float16, seed) for seed in (5, 6))
    expert_ids = choice("spread", num_tokens, num_experts=5)
    weights = weights_of(expert_ids)
    expected = residual.double().cpu()
    expected += written_out(x.cpu(), expert_ids, weights, on(experts, torch.device("cpu")))
    of_tile = 16 if num_tokens == 1 else 64
    given = x, expert_ids, weights, experts
    if experts.has_words:
        found = add_experts_in_words(*given, residual.clone(), shapes=(WordsShape(of_tile, 32, 2, 1, 1, parts=2),) * 2)
    else:
        tile = ProductShape(of_tile, 32, 32, stages=2, num_warps=1)
        found = add_experts(*given, residual.clone(), shape=tile, num_programs=3)
    assert_close(found, expected)
    if num_tokens == 1 and not experts.has_words:
        assert_close(add_experts_of_one(x, expert_ids, weights, experts, residual.clone()), expected)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("gate", [CLAMPED, SWIGLU, RELU2], ids=["clamped", "swiglu", "relu2"])
def test_a_number_that_is_none_stays_with_its_token(gate: Gate, num_tokens: int) -> None:
    """No limit makes a number of it."""
    experts, x = layer(gate=gate), tokens(num_tokens)
    x[0, 5] = float("nan")
    expert_ids = choice("the same for all", num_tokens)
    kernels = [add_experts, add_experts_of_one] if num_tokens == 1 else [add_experts]
    for add in kernels:
        found = add(x, expert_ids, weights_of(expert_ids), experts, torch.zeros_like(x))
        assert bool(found[0].isnan().all())
        assert bool(found[1:].isfinite().all())


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_biases_of_the_first_products_alone(num_tokens: int) -> None:
    """Of several ranks only the first has those behind the sum."""
    experts, x, residual = layer(gate=CLAMPED), tokens(num_tokens), tokens(num_tokens, seed=6)
    experts = replace(experts, down=replace(experts.down, bias=None))
    expert_ids = choice("spread", num_tokens)
    weights = weights_of(expert_ids)
    expected = residual.double().cpu() + written_out(x.cpu(), expert_ids, weights, on(experts, torch.device("cpu")))
    assert_close(add_experts(x, expert_ids, weights, experts, residual.clone(), shape=TILE, num_programs=3), expected)
    if num_tokens == 1:
        assert_close(add_experts_of_one(x, expert_ids, weights, experts, residual.clone()), expected)


@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_a_matrix_of_few_bits_beside_a_plain_one_shares_its_tiles(part: str) -> None:
    """More than 64 tokens of an expert, where the tiles of plain matrices alone would have 128."""
    num_tokens, num_experts = 70, 2
    routing = Routing(num_experts, "softmax")
    experts = expert_layer(num_experts, HIDDEN, SIZE, routing, SWIGLU, bias=False)
    packed = quantised(experts, SMALL_FORMATS["fp8 channel"])
    experts = on(replace(experts, **{part: getattr(packed, part)}), DEVICE)
    x, residual = tokens(num_tokens), tokens(num_tokens, seed=6)
    expert_ids = choice("spread", num_tokens, num_experts, num_experts)
    weights = weights_of(expert_ids)
    expected = reference.add_experts(x, expert_ids, weights, experts, residual.clone())
    found = add_experts(x, expert_ids, weights, experts, residual.clone(), num_programs=3)
    assert_close(found, expected.double().cpu())


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_a_whole_layer_equals_its_twin(num_tokens: int) -> None:
    experts, x = layer(), tokens(num_tokens)
    for norm in (Norm(torch.linspace(0.5, 1.5, HIDDEN, device=DEVICE), 1e-5), None):
        expected = reference.norm_add_experts(x.clone(), norm, experts)
        assert_close(ExpertKernels(DEVICE).norm_add(x.clone(), norm, experts), expected.double().cpu())


@pytest.mark.parametrize(
    "routing",
    [FEW, Routing(TOP_K, "softmax_of_chosen"), Routing(TOP_K, "sigmoid", renormalised=True)],
    ids=lambda r: r.scores,
)
def test_a_token_that_is_no_number_chooses_experts_that_exist_and_leaves_the_others_alone(routing: Routing) -> None:
    """Five experts lie in 16 columns, and on a GPU any column may be the greatest of those that are no numbers."""
    experts = on(
        expert_layer(5, HIDDEN, SIZE, routing, SWIGLU, bias=True, correction=routing.scores == "sigmoid"), DEVICE
    )
    x, arrivals = tokens(20), make_arrivals(DEVICE)
    expected = ExpertKernels(DEVICE).norm_add(x.clone(), None, experts)
    x[7] = float("nan")
    alone = norm_route_one(x[7:8], torch.ones(HIDDEN, device=DEVICE), 1e-5, experts, arrivals=arrivals)
    chosen = torch.cat([route(x, experts, arrivals=arrivals)[0], alone[1]])
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 5
    found = ExpertKernels(DEVICE).norm_add(x, None, experts)
    others = torch.arange(20, device=DEVICE) != 7
    # where a token lies in its tile depends on what the others chose, and the last bits on that
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=1e-5)
    assert found[7].isnan().all()


def test_no_token_makes_no_launch() -> None:
    experts, x = layer(), tokens(0)
    assert ExpertKernels(DEVICE).norm_add(x, Norm(torch.ones(HIDDEN, device=DEVICE), 1e-5), experts).shape == (
        0,
        HIDDEN,
    )


def test_refuses_what_does_not_fit() -> None:
    experts, x, expert_ids = layer(), tokens(2), choice("spread", 2)
    weights = weights_of(expert_ids)
    with pytest.raises(ValueError, match="do not fit each other"):
        route(x.half(), experts, arrivals=make_arrivals(DEVICE))
    with pytest.raises(ValueError, match="not one token"):
        norm_route_one(x, torch.ones(HIDDEN, device=DEVICE), 1e-5, experts, arrivals=make_arrivals(DEVICE))
    with pytest.raises(ValueError, match="do not fit 2 tokens' choice"):
        add_experts(x, expert_ids, weights, experts, x.half())
    with pytest.raises(ValueError, match=r"gate_up \(8, 64, 32\) is not \[E, 64, 16\]"):
        add_experts(x[:, :16].contiguous(), expert_ids, weights, experts, x[:, :16].contiguous())
    unread = quantised(expert_layer(EXPERTS, 48, 48, FEW, SWIGLU, bias=False), Format("int4", (1, 24)))
    with pytest.raises(ValueError, match=r"gate_up is of Format\(codes='int4', block=\(1, 24\).*not read by these"):
        add_experts(tokens(2, 48), expert_ids, weights, on(unread, DEVICE), tokens(2, 48))
    with pytest.raises(ValueError, match="are not one token"):
        add_experts_of_one(x, expert_ids, weights, experts, x.clone())
    words = on(quantised(expert_layer(EXPERTS, HIDDEN, SIZE, FEW, SWIGLU, bias=False), MXFP4), DEVICE)
    one = x[:1], expert_ids[:1], weights[:1]
    for add in (add_experts_of_one, add_experts):
        with pytest.raises(ValueError, match="numbers in words"):
            add(*one, words, x[:1].clone())
    with pytest.raises(ValueError, match="not both in words"):
        add_experts_in_words(*one, replace(words, down=experts.down), x[:1].clone())


GEOMETRIES = {
    "qwen3-30b-a3b": (2048, 768, 128, 8, PLAIN),
    "qwen3-30b-a3b, fp8 block": (2048, 768, 128, 8, Format("fp8", (128, 128))),
    "qwen3-30b-a3b, fp8 channel": (2048, 768, 128, 8, Format("fp8", (1, 0))),
    "qwen3-30b-a3b, int4": (2048, 768, 128, 8, Format("int4", (1, 128))),
    "qwen3-30b-a3b, int4 group 32, zeros": (
        2048, 768, 128, 8, Format("int4", (1, 32), zeros=True, scale_dtype=torch.float16),
    ),
    "qwen3-30b-a3b, nvfp4": (
        2048, 768, 128, 8, Format("fp4", (1, 16), row_scales=True, scale_dtype=torch.float8_e4m3fn),
    ),
    "minimax-m2, fp8 block": (3072, 1536, 64, 8, Format("fp8", (128, 128))),
    "gpt-oss-20b": (2880, 2880, 32, 4, PLAIN),
    "gpt-oss-20b, mxfp4": (2880, 2880, 32, 4, MXFP4),
    "gpt-oss-20b, int4": (2880, 2880, 32, 4, Format("int4", (1, 64))),
    "mixtral-8x7b": (4096, 14336, 8, 2, PLAIN),
    "mixtral-8x7b, int8 channel": (4096, 14336, 8, 2, Format("int8", (1, 0))),
}  # fmt: skip


def packed_on_device(experts: Experts, format: Format) -> Experts:
    experts = on(experts, DEVICE)
    return experts if format == PLAIN else quantised(experts, format)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 100, 1024])
@pytest.mark.parametrize(("hidden", "size", "num_experts", "top_k", "format"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_published_geometries_equal_the_twin(
    hidden: int, size: int, num_experts: int, top_k: int, format: Format, num_tokens: int
) -> None:
    """The twin in float32 on the same device, with the same choice."""
    gate = CLAMPED if size == hidden else SWIGLU
    routing = Routing(top_k, "softmax", renormalised=True)
    plain = expert_layer(num_experts, hidden, size, routing, gate, bias=size == hidden, dtype=torch.bfloat16)
    experts = packed_on_device(plain, format)
    x, residual = tokens(num_tokens, hidden, torch.bfloat16), tokens(num_tokens, hidden, torch.bfloat16, seed=6)
    for kind in ("spread", "the same for all", "some get none"):
        expert_ids = choice(kind, num_tokens, top_k, num_experts)
        weights = weights_of(expert_ids)
        expected = reference.add_experts(
            x.float(), expert_ids, weights, on(experts, DEVICE, torch.float32), residual.float()
        )
        found = ExpertKernels(DEVICE).add(x, expert_ids, weights, experts, residual.clone())
        assert_close(found, expected.double().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("format", [PLAIN, *SMALL_FORMATS.values()], ids=["plain", *SMALL_FORMATS])
@pytest.mark.parametrize("num_tokens", [1, 16, 300])
def test_a_captured_layer_computes_what_it_computes_without_a_graph(num_tokens: int, format: Format) -> None:
    """Other tokens at replay choose other experts: nothing of a choice is in the graph."""
    plain = expert_layer(EXPERTS, 128, 128, FEW, SWIGLU, bias=False, dtype=torch.bfloat16)
    experts = packed_on_device(plain, format)
    kernels, norm = ExpertKernels(DEVICE), Norm(torch.ones(128, device=DEVICE, dtype=torch.bfloat16), 1e-5)
    x, given = (tokens(num_tokens, 128, torch.bfloat16, seed) for seed in (5, 11))
    kernels.norm_add(x.clone(), norm, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.norm_add(x.clone(), norm, experts)
    x.copy_(given)
    graph.replay()
    assert torch.equal(found, kernels.norm_add(given.clone(), norm, experts))
