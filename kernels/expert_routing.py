"""A router's product and the choice of experts in one launch: the programs of a few tokens share out the experts and,
of each, the columns; the last one to arrive adds up and chooses.

The choice takes the best expert, strikes it out and looks again, k times, over all experts of a token in registers; of
equals the first is taken. For a lone token the norm before is part of the launch, and its result is left for the
experts. Logits, scores and weights are float32.
Sources: Shazeer et al., 2017; groups and the correction of scores: DeepSeek-V3, 2024.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.expert_words import Values, store_split
from paged_kernels.experts import Experts
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.sampling import arrive

_SCORES = {"softmax": 0, "softmax_of_chosen": 1, "sigmoid": 2}
_SOFTMAX, _OF_CHOSEN, _SIGMOID = (tl.constexpr(value) for value in _SCORES.values())
_MAX_TILES = 4096
_CHOSEN_AT_ONCE = 4096  # tokens times experts that a program chooses from, in registers
_FEW_TOKENS = 256  # up to here a tile has few tokens, and its experts and columns are shared out
_FEW_COLUMNS = 512


@triton.jit
def _best_groups(
    ranked,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
):
    """[TOKENS, EXPERTS], -inf for the experts of all groups but the best, each as good as its GROUP_BEST best experts
    together, one or two.
    """
    expert = tl.arange(0, EXPERTS)[None, :]
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group = expert // size
    worth = tl.full([TOKENS, EXPERTS], float("-inf"), tl.float32)  # of the expert's group
    for g in tl.static_range(NUM_GROUPS):
        inside = tl.where(group == g, ranked, float("-inf"))
        best = tl.max(inside, 1)
        at = tl.argmax(inside, 1)
        second = tl.max(tl.where(expert == at[:, None], float("-inf"), inside), 1)
        both = best if size == 1 or GROUP_BEST == 1 else best + second
        worth = tl.where(group == g, both[:, None], worth)
    kept = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        at = tl.argmax(worth, 1)
        mine = group == (at // size)[:, None]
        kept = tl.where(mine, 1, kept)
        worth = tl.where(mine, float("-inf"), worth)
    return tl.where(kept > 0, ranked, float("-inf"))


@triton.jit
def _choose(
    logits, correction, expert_ids, weights, token, num_tokens, scale,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    SCORES: tl.constexpr, RENORMALISED: tl.constexpr, CORRECTED: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """Writes the experts and weights of TOKENS tokens from their logits [TOKENS, EXPERTS], which are -inf beyond
    NUM_EXPERTS.
    """
    expert = tl.arange(0, EXPERTS)
    there = expert < NUM_EXPERTS
    scores = logits
    if SCORES == _SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    if SCORES == _SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    ranked = scores
    if CORRECTED:
        ranked += tl.load(correction + expert, mask=there, other=0.0)[None, :]
    ranked = tl.where(there[None, :], ranked, float("-inf"))
    if NUM_GROUPS > 1:
        ranked = _best_groups(ranked, TOKENS, EXPERTS, NUM_EXPERTS, NUM_GROUPS, TOP_GROUPS, GROUP_BEST)
    choice = tl.arange(0, CHOICES)
    ids = tl.zeros([TOKENS, CHOICES], tl.int32)
    chosen = tl.full([TOKENS, CHOICES], float("-inf") if SCORES == _OF_CHOSEN else 0.0, tl.float32)
    for j in tl.static_range(TOP_K):
        # where no score is a number, argmax may give a column of the padding
        best = tl.minimum(tl.argmax(ranked, 1), NUM_EXPERTS - 1)
        is_best = expert[None, :] == best[:, None]
        score = tl.sum(tl.where(is_best, scores, 0.0), 1)
        ids = tl.where((choice == j)[None, :], best[:, None].to(tl.int32), ids)
        chosen = tl.where((choice == j)[None, :], score[:, None], chosen)
        ranked = tl.where(is_best, float("-inf"), ranked)
    if SCORES == _OF_CHOSEN:
        chosen = tl.exp(chosen - tl.max(chosen, 1)[:, None])
        chosen = chosen / tl.sum(chosen, 1)[:, None]
    elif RENORMALISED:
        chosen = chosen / tl.maximum(tl.sum(chosen, 1), 1e-20)[:, None]
    place = token.to(tl.int64)[:, None] * TOP_K + choice[None, :]
    wanted = (token < num_tokens)[:, None] & (choice < TOP_K)[None, :]
    tl.store(expert_ids + place, ids, mask=wanted)
    tl.store(weights + place, chosen * scale, mask=wanted)


@kernel(ints=["num_tokens"])
def _route_kernel(
    x, weight, bias, correction, logits, arrivals, expert_ids, weights, num_tokens, x_stride, scale,
    K: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    SCORES: tl.constexpr, RENORMALISED: tl.constexpr, BIAS: tl.constexpr, CORRECTED: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, LAUNCH_PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What SPAN columns add to PART experts' logits of TOKENS tokens: logits[span, token, expert]; the last program of
    the tokens chooses.
    """
    pdl_release(LAUNCH_PDL)
    tile = tl.program_id(0)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    known = token < num_tokens
    row = tl.program_id(1) * PART + tl.arange(0, PART)
    there = row < NUM_EXPERTS
    SPANS: tl.constexpr = (K + SPAN - 1) // SPAN
    span = tl.program_id(2)
    column = span * SPAN + tl.arange(0, BLOCK)
    tokens_at = x + token.to(tl.int64)[:, None] * x_stride
    pdl_wait(LAUNCH_PDL)
    total = tl.zeros([TOKENS, PART], tl.float32)
    for begin in tl.range(0, min(SPAN, K), BLOCK, num_stages=STAGES):
        inside = (begin + column < K)[None, :]
        values = tl.load(tokens_at + (begin + column)[None, :], mask=known[:, None] & inside, other=0.0)
        w = tl.load(weight + (row * K)[:, None] + (begin + column)[None, :], mask=there[:, None] & inside, other=0.0)
        total = tl.dot(values, tl.trans(w), total, input_precision=PRECISION)
    of_span = num_tokens.to(tl.int64) * EXPERTS
    at = logits + token.to(tl.int64)[:, None] * EXPERTS
    tl.store(at + span * of_span + row[None, :], total, mask=known[:, None])
    if arrive(arrivals + tile, tl.num_programs(1) * tl.num_programs(2)):
        tl.store(arrivals + tile, 0)
        all_experts = tl.arange(0, EXPERTS)
        found = tl.zeros([TOKENS, EXPERTS], tl.float32)
        for other in tl.static_range(SPANS):
            found += tl.load(
                at + other * of_span + all_experts[None, :], mask=known[:, None], other=0.0, cache_modifier=".cg"
            )
        if BIAS:
            found += tl.load(bias + all_experts, mask=all_experts < NUM_EXPERTS, other=0.0).to(tl.float32)[None, :]
        found = tl.where((all_experts < NUM_EXPERTS)[None, :], found, float("-inf"))
        _choose(
            found, correction, expert_ids, weights, token, num_tokens, scale,
            NUM_EXPERTS, EXPERTS, TOKENS, TOP_K, CHOICES, SCORES, RENORMALISED, CORRECTED, NUM_GROUPS, TOP_GROUPS,
            GROUP_BEST,
        )  # fmt: skip


@kernel
def _route_one_kernel(
    x, norm_weight, weight, bias, correction, normed, parts, part_scales, logits, arrivals, expert_ids, weights, eps,
    scale,
    K: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, SCORES: tl.constexpr, RENORMALISED: tl.constexpr, BIAS: tl.constexpr,
    CORRECTED: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
    PADDED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """PART experts' logits of the one token, whose norm every program computes for itself; the first leaves it for the
    experts, and, if PADDED is not 0, the two parts that they multiply (expert_words.py).
    """
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * PART + tl.arange(0, PART)
    there = row < NUM_EXPERTS
    column = tl.arange(0, BLOCK)
    inside = column < K
    # no kernel of a step writes weights
    w = tl.load(weight + (row * K)[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    scaling = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    pdl_wait(LAUNCH_PDL)
    wide = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    # rounded as the reference rounds
    shrunk = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)).to(normed.dtype.element_ty)
    value = (scaling * shrunk.to(tl.float32)).to(normed.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(normed + column, value, mask=inside)
        if PADDED > 0:
            store_split(tl.where(inside, value.to(tl.float32), 0.0), parts, part_scales, 0, column, PADDED)
    total = tl.sum(w.to(tl.float32) * value.to(tl.float32)[None, :], 1)
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(logits + row, tl.where(there, total, float("-inf")), mask=row < EXPERTS)
    if arrive(arrivals, tl.num_programs(0)):
        tl.store(arrivals, 0)
        found = tl.load(logits + tl.arange(0, EXPERTS), cache_modifier=".cg")
        _choose(
            found[None, :], correction, expert_ids, weights, tl.arange(0, 1), 1, scale,
            NUM_EXPERTS, EXPERTS, 1, TOP_K, CHOICES, SCORES, RENORMALISED, CORRECTED, NUM_GROUPS, TOP_GROUPS,
            GROUP_BEST,
        )  # fmt: skip


def make_arrivals(device: torch.device) -> torch.Tensor:
    """Counters of both kernels, zero between launches; launches that share them run one after another."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def route_shape(num_tokens: int, num_experts: int, num_columns: int) -> tuple[int, int, int, int]:
    """Tokens of a tile, experts and columns of a program, and all experts, rounded up. A few tokens' experts and
    columns are shared out, so that more programs read the router.
    """
    padded = _padded(num_experts)
    if num_tokens <= _FEW_TOKENS:
        return 16, 16, _FEW_COLUMNS, padded
    return min(64, max(16, _CHOSEN_AT_ONCE // padded)), min(64, padded), num_columns, padded


def route(
    x: torch.Tensor, experts: Experts, *, arrivals: torch.Tensor, launch_pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.route: [T, hidden] -> int32 [T, k] and float32 [T, k].

    x: rows contiguous, of the router's dtype (bfloat16, float16, float32). arrivals: `make_arrivals`. launch_pdl: begin
    while the kernel before drains (programmatic dependent launch); reads nothing before that kernel is complete. Raises
    ValueError for shapes and dtypes that do not fit.
    """
    num_tokens = len(x)
    _check(x, experts)
    size = x.shape[1]
    tokens, part, span, padded = route_shape(num_tokens, experts.num_experts, size)
    tiles = triton.cdiv(num_tokens, tokens)
    if tiles > len(arrivals):
        raise ValueError(f"{num_tokens} tokens in tiles of {tokens} are more than {len(arrivals)} tiles")
    expert_ids, weights = _found(x, experts)
    if num_tokens:
        spans, block = triton.cdiv(size, span), min(128, max(16, triton.next_power_of_2(size)))
        logits = torch.empty(spans, num_tokens, padded, dtype=torch.float32, device=x.device)
        _route_kernel[(tiles, padded // part, spans)](
            x, *_parameters(experts, x), logits, arrivals, expert_ids, weights, num_tokens, x.stride(0),
            experts.routing.scale,
            K=size, NUM_EXPERTS=experts.num_experts, EXPERTS=padded, TOKENS=tokens, PART=part,
            SPAN=span, BLOCK=block, STAGES=4, **_choice(experts), LAUNCH_PDL=launch_pdl,
            PRECISION="ieee", num_warps=4,
        )  # fmt: skip
    return expert_ids, weights


def norm_route_one(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    experts: Experts,
    *,
    arrivals: torch.Tensor,
    halves: Values | None = None,
    launch_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain norm of a token, and reference.route of it: [1, hidden] -> [1, hidden], int32 [1, k], float32 [1, k].

    norm_weight: [hidden], of x's dtype. halves: `empty_values`, if experts want `split_rows` of the norm. Otherwise as
    `route`; weights are read before the kernel ahead is complete.
    """
    _check(x, experts)
    size, padded = x.shape[1], _padded(experts.num_experts)
    if len(x) != 1 or norm_weight.shape != (size,) or norm_weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} is not one token, or norm_weight {tuple(norm_weight.shape)} "
            f"{norm_weight.dtype} does not fit it"
        )
    normed = torch.empty_like(x)
    expert_ids, weights = _found(x, experts)
    logits = torch.empty(padded, dtype=torch.float32, device=x.device)
    part, (out, scales) = 1 if size > 2048 else 2, halves or (normed, logits)
    _route_one_kernel[(triton.cdiv(padded, part),)](
        x, norm_weight, *_parameters(experts, x), normed, out, scales, logits, arrivals, expert_ids, weights, eps,
        experts.routing.scale,
        K=size, NUM_EXPERTS=experts.num_experts, EXPERTS=padded, PART=part, BLOCK=triton.next_power_of_2(size),
        **_choice(experts), PADDED=out.shape[2] if halves else 0, LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip
    return normed, expert_ids, weights


def _found(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(x), experts.routing.top_k
    return torch.empty(shape, dtype=torch.int32, device=x.device), torch.empty(
        shape, dtype=torch.float32, device=x.device
    )


def _parameters(experts: Experts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias and correction; x where there is none."""
    router, correction = experts.router, experts.correction
    return router.weight, x if router.bias is None else router.bias, x if correction is None else correction


def _choice(experts: Experts) -> dict[str, object]:
    routing = experts.routing
    return {
        "TOP_K": routing.top_k, "CHOICES": triton.next_power_of_2(routing.top_k), "SCORES": _SCORES[routing.scores],
        "RENORMALISED": routing.renormalised, "BIAS": experts.router.bias is not None,
        "CORRECTED": experts.correction is not None, "NUM_GROUPS": routing.num_groups, "TOP_GROUPS": routing.top_groups,
        "GROUP_BEST": routing.group_best,
    }  # fmt: skip


def _padded(num_experts: int) -> int:
    """Rounded up to a power of two that a product takes."""
    return max(16, triton.next_power_of_2(num_experts))


def _check(x: torch.Tensor, experts: Experts) -> None:
    weight, correction = experts.router.weight, experts.correction
    if x.dtype != weight.dtype or x.shape[1] != weight.shape[1] or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and the router {tuple(weight.shape)} {weight.dtype}, both contiguous, "
            "do not fit each other"
        )
    if correction is not None and (correction.dtype != torch.float32 or len(correction) != len(weight)):
        raise ValueError(f"correction {tuple(correction.shape)} {correction.dtype} is not float32 [{len(weight)}]")
