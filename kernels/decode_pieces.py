"""Pieces of a run that several work items of decode attention share (decode_attention.py): each leaves its own in
the workspace, and the last to arrive merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of_row(row, stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr):
    """Where in q or out the heads of a tile's rows lie, behind the run's first decode: row r is query head r % GROUP of
    decode r // GROUP.
    """
    if QUERIES > 1:
        place = row // GROUP * stride + row % GROUP * HEAD_DIM
    else:
        place = row * HEAD_DIM
    return place


@triton.jit
def _barrier(COMPILED: tl.constexpr):
    """tl.debug_barrier() in words that the compiler does not know: it pipelines no loop with a barrier in it."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def put_whole(
    result, num_rows, out_rows, out_stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """Leave `num_rows` rows of a run that is in one piece where they belong."""
    dim = tl.arange(0, result.shape[1])
    row = tl.arange(0, result.shape[0])
    target = out_rows + place_of_row(row[:, None], out_stride, GROUP, HEAD_DIM, QUERIES)
    tl.store(
        target + dim[None, :],
        result.to(out_rows.dtype.element_ty),
        mask=(row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit
def put_piece(
    result, lse, num_rows, item, head, begins, first_item, last_item, arrivals, partial_acc, partial_lse,
    HEADS: tl.constexpr, PIECE_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Leave a piece of a run that work items `first_item` to `last_item` share in the workspace, `num_rows` of the
    PIECE_ROWS that there is room for; 1 if all others are there already, else 0.
    """
    row = tl.arange(0, result.shape[0])
    dim = tl.arange(0, result.shape[1])
    piece = ((2 * item + begins.to(tl.int32)) * HEADS + head) * PIECE_ROWS
    tl.store(partial_lse + piece + row, lse, mask=row < num_rows)
    tl.store(
        partial_acc + (piece + row[:, None]) * HEAD_DIM + dim[None, :],
        result,
        mask=(row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :],
    )
    _barrier(COMPILED)  # every thread's stores come before the release
    earlier = tl.atomic_add(arrivals + first_item * HEADS + head, 1, sem="acq_rel", scope="gpu")
    return (earlier == last_item - first_item).to(tl.int32)


@triton.jit
def _merge(
    first_item, last_item, first_row, num_rows, head, out_rows, out_stride, partial_acc, partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Weigh ROWS of a run's partial outputs by their sums of softmax, PARTS at a time: [PARTS, ROWS, HEAD_PAD] float32.

    Little code: it runs once, at the end, where every line of it is an instruction cache miss.
    """
    row = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1)
    dim = tl.arange(0, HEAD_PAD)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for item in range(first_item, last_item + 1, PARTS):
        at = item + tl.arange(0, PARTS)
        there = at <= last_item
        piece = (tl.where(at == first_item, 2 * at + 1, 2 * at) * HEADS + head)[:, None] * (GROUP * QUERIES)
        piece += row[None, :]
        part = tl.load(
            partial_acc + piece[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=there[:, None, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        lse = tl.load(partial_lse + piece, mask=there[:, None], other=float("-inf"), cache_modifier=".cg")
        new_m = tl.maximum(m, tl.max(lse, 0))
        least = new_m
        if QUERIES > 1:
            least = tl.where(new_m == float("-inf"), 0.0, new_m)  # of a row that sees nothing of these pieces
        weight = tl.exp2(lse - least[None, :])
        alpha = tl.exp2(m - least)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 0)
        l = l * alpha + tl.sum(weight, 0)
        m = new_m
    rows = first_row + tl.arange(0, ROWS)
    where = out_rows + place_of_row(rows[:, None], out_stride, GROUP, HEAD_DIM, QUERIES) + dim[None, :]
    tl.store(
        where,
        (acc * (1.0 / l)[:, None]).to(out_rows.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit
def merge_run(
    first, last, num_rows, head, target, out_stride, arrivals, partial_acc, partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    FEW_PARTS: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Merges the pieces that work items `first` to `last` left of a run, and leaves its counter at zero for the next
    launch.
    """
    for first_row in range(0, num_rows if QUERIES > 1 else 1, ROWS):
        if last - first < FEW_PARTS:
            _merge(first, last, first_row, num_rows, head, target, out_stride, partial_acc, partial_lse, HEADS,
                   GROUP, ROWS, HEAD_DIM, HEAD_PAD, FEW_PARTS, QUERIES)  # fmt: skip
        else:
            _merge(first, last, first_row, num_rows, head, target, out_stride, partial_acc, partial_lse, HEADS,
                   GROUP, ROWS, HEAD_DIM, HEAD_PAD, PARTS, QUERIES)  # fmt: skip
    tl.store(arrivals + first * HEADS + head, 0)


@triton.jit
def merge_pieces(
    came_last, first_run, last_run, item, begun_in, begun_to, last_to, head, out, out_stride, arrivals, partial_acc,
    partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    FEW_PARTS: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The last of a run's programs to come merges its pieces: of the run this item began inside of (1 in came_last),
    and of the one it stopped inside of (2).
    """
    for part in range(1, 3):
        if (came_last & part) > 0:
            first, last = tl.where(part == 1, begun_in, item), tl.where(part == 1, begun_to, last_to)
            run = tl.where(part == 1, first_run, last_run)
            before = run % QUERIES
            target = out + (run // QUERIES - before).to(tl.int64) * out_stride
            merge_run(first, last, GROUP * (before + 1), head, target, out_stride, arrivals, partial_acc, partial_lse,
                      HEADS, GROUP, ROWS, HEAD_DIM, HEAD_PAD, FEW_PARTS, PARTS, QUERIES)  # fmt: skip
