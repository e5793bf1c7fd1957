"""Pieces of a sequence that several work items of decode attention share (decode_attention.py): each leaves its own in
the workspace, and the last to arrive merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _barrier(COMPILED: tl.constexpr):
    """tl.debug_barrier() in words that the compiler does not know: it pipelines no loop with a barrier in it."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def put_piece(
    result, lse, item, head, begins, first_item, last_item, arrivals, partial_acc, partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Leave a piece of a sequence that work items `first_item` to `last_item` share in the workspace; 1 if all others
    are there already, else 0.
    """
    row = tl.arange(0, result.shape[0])
    dim = tl.arange(0, result.shape[1])
    piece = ((2 * item + begins.to(tl.int32)) * HEADS + head) * GROUP
    tl.store(partial_lse + piece + row, lse, mask=row < GROUP)
    tl.store(
        partial_acc + (piece + row[:, None]) * HEAD_DIM + dim[None, :],
        result,
        mask=(row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
    )
    _barrier(COMPILED)  # every thread's stores come before the release
    earlier = tl.atomic_add(arrivals + first_item * HEADS + head, 1, sem="acq_rel", scope="gpu")
    return (earlier == last_item - first_item).to(tl.int32)


@triton.jit
def _merge(
    first_item, last_item, head, out_rows, partial_acc, partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh a sequence's partial outputs by their sums of softmax, PARTS at a time: [PARTS, GROUP_PAD, HEAD_PAD]
    float32.

    Little code: it runs once, at the end, where every line of it is an instruction cache miss.
    """
    row = tl.minimum(tl.arange(0, GROUP_PAD), GROUP - 1)
    dim = tl.arange(0, HEAD_PAD)
    m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    l = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for item in range(first_item, last_item + 1, PARTS):
        at = item + tl.arange(0, PARTS)
        there = at <= last_item
        piece = (tl.where(at == first_item, 2 * at + 1, 2 * at) * HEADS + head)[:, None] * GROUP + row[None, :]
        part = tl.load(
            partial_acc + piece[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=there[:, None, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        lse = tl.load(partial_lse + piece, mask=there[:, None], other=float("-inf"), cache_modifier=".cg")
        new_m = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - new_m[None, :])
        alpha = tl.exp2(m - new_m)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 0)
        l = l * alpha + tl.sum(weight, 0)
        m = new_m
    rows = tl.arange(0, GROUP_PAD)
    where = out_rows + rows[:, None] * HEAD_DIM + dim[None, :]
    tl.store(
        where,
        (acc * (1.0 / l)[:, None]).to(out_rows.dtype.element_ty),
        mask=(rows < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit
def merge_pieces(
    came_last, first_seq, last_seq, item, begun_in, begun_to, last_to, head, out, out_stride, arrivals, partial_acc,
    partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    FEW_PARTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The last of a sequence's programs to come merges its pieces and leaves the counter at zero for the next launch:
    of the sequence this item began inside of (1 in came_last), and of the one it stopped inside of (2).
    """
    for part in range(1, 3):
        if (came_last & part) > 0:
            first, last = tl.where(part == 1, begun_in, item), tl.where(part == 1, begun_to, last_to)
            target = out + tl.where(part == 1, first_seq, last_seq).to(tl.int64) * out_stride
            if last - first < FEW_PARTS:
                _merge(first, last, head, target, partial_acc, partial_lse, HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD,
                       FEW_PARTS)  # fmt: skip
            else:
                _merge(first, last, head, target, partial_acc, partial_lse, HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD,
                       PARTS)  # fmt: skip
            tl.store(arrivals + first * HEADS + head, 0)
