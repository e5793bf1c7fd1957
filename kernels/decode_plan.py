"""The line of tiles that `decode_attention` walks, cut into equal shares on the device from a step's lengths; and the
scratch memory that goes with it.

What lies on the line are runs. A run is decodes of one sequence that come one after another: its newest token and the
drafts behind it, up to QUERIES of them, which see the same tokens but for the last few. Where nothing is packed,
QUERIES is 1 and every decode is a run. A run is known by one number, `last * QUERIES + before`: the place of its last
decode in the step, and how many come before that one. Its length is the last one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.device_traits import traits_of
from paged_kernels.jit import kernel

_MOST_ROWS = 64  # query heads of a KV head times decodes of a run, of up to 128 dimensions: more sums fit no registers

# A work item's record in `starts`, int32 [RECORD_WORDS]: where it begins on the line, and with which other work items
# it shares runs.
RECORD_WORDS = tl.constexpr(8)
AT_RECORD = tl.constexpr(0)  # the place in `records` of the run that it begins in
AT_RUN = tl.constexpr(1)  # that run,
AT_LENGTH = tl.constexpr(2)  # its length,
AT_TILE = tl.constexpr(3)  # and the tile of it that comes first
BEGUN_IN = tl.constexpr(4)  # the first work item that computes a part of that run,
BEGUN_TO = tl.constexpr(5)  # and the last
LAST_RUN = tl.constexpr(6)  # the run in which it ends,
LAST_TO = tl.constexpr(7)  # and the last work item that computes a part of it: itself if it ends there


@triton.jit
def first_token(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the first tile begins of a sequence whose last position is length - 1: at its first visible position or
    less than a tile before.
    """
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE * TILE
    return first


@triton.jit
def _num_tiles(run, length, TILE: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr):
    return (length - first_token(length - run % QUERIES, TILE, WINDOW) + TILE - 1) // TILE


@triton.jit
def _locate(
    place, begins, ends, run, length, record, TILE: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """What lies at each `place` [places] of the line: record, run, its length, tile in it, its number of tiles."""
    here = (begins[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
    of_run = tl.sum(tl.where(here, run[None, :], 0), 1)
    of_length = tl.sum(tl.where(here, length[None, :], 0), 1)
    tile = place - tl.sum(tl.where(here, begins[None, :], 0), 1)
    of_record = tl.sum(tl.where(here, record[None, :], 0), 1)
    return of_record, of_run, of_length, tile, _num_tiles(of_run, of_length, TILE, WINDOW, QUERIES)


@triton.jit
def _greater(one, other):
    return tl.maximum(one, other)


@triton.jit
def _before_in_run(rows, decode, num_decodes, QUERIES: tl.constexpr):
    """Of each decode, how many of its run come before it, and whether it is the run's last. Neighbours with one row are
    a sequence's; more than QUERIES of them are several runs.
    """
    row = tl.load(rows + decode, mask=decode < num_decodes, other=-1)
    row_before = tl.load(rows + decode - 1, mask=(decode > 0) & (decode < num_decodes), other=-1)
    row_after = tl.load(rows + decode + 1, mask=decode + 1 < num_decodes, other=-1)
    first = tl.associative_scan(tl.where(row != row_before, decode, 0), 0, _greater)
    before = (decode - first) % QUERIES
    return before, (row != row_after) | (before == QUERIES - 1)


@kernel(ints=["num_sequences", "num_work_items"], unaligned=["seq_lens", "rows"])
def _plan_kernel(
    seq_lens, rows, line, starts, records, num_sequences, num_work_items,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr, ITEMS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Each program places ITEMS work items on the line; the first one also writes the records.

    rows: whose each decode is, where QUERIES > 1; else None.
    line: [2] tiles of a work item, tiles in the line. records: [sequences, 2] number and length of the non-empty runs,
    in order.
    starts: [work items, RECORD_WORDS], as above.
    """
    part = tl.program_id(0)
    seq = tl.arange(0, SEQUENCES)
    length = tl.load(seq_lens + seq, mask=seq < num_sequences, other=0)
    if QUERIES > 1:
        before, is_last = _before_in_run(rows, seq, num_sequences, QUERIES)
        run = seq * QUERIES + before
        length = tl.where(is_last, length, 0)
    else:
        run = seq
    tiles = _num_tiles(run, length, TILE, WINDOW, QUERIES)
    ends = tl.cumsum(tiles, 0)
    begins = ends - tiles
    filled = (length > 0).to(tl.int32)
    record = tl.cumsum(filled, 0) - filled
    total = tl.sum(tiles, 0)
    share = tl.maximum((total + num_work_items - 1) // num_work_items, 1)

    item = part * ITEMS + tl.arange(0, ITEMS)
    mine = item < num_work_items
    place = item * share
    at_record, at_run, at_length, at_tile, at_tiles = _locate(
        place, begins, ends, run, length, record, TILE, WINDOW, QUERIES
    )
    cell = starts + item * RECORD_WORDS
    tl.store(cell + AT_RECORD, at_record, mask=mine)
    tl.store(cell + AT_RUN, at_run, mask=mine)
    tl.store(cell + AT_LENGTH, at_length, mask=mine)
    tl.store(cell + AT_TILE, at_tile, mask=mine)
    tl.store(cell + BEGUN_IN, (place - at_tile) // share, mask=mine)
    tl.store(cell + BEGUN_TO, (place - at_tile + at_tiles - 1) // share, mask=mine)
    last = tl.minimum(place + share, total) - 1
    _, at_run, _, at_tile, at_tiles = _locate(last, begins, ends, run, length, record, TILE, WINDOW, QUERIES)
    begin = last - at_tile
    tl.store(cell + LAST_RUN, at_run, mask=mine)
    tl.store(cell + LAST_TO, tl.where(begin >= place, (begin + at_tiles - 1) // share, item), mask=mine)
    if part == 0:
        tl.store(line, share)
        tl.store(line + 1, total)
        tl.store(records + record * 2, run, mask=filled > 0)
        tl.store(records + record * 2 + 1, length, mask=filled > 0)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one model's decode attention on one device; layers that run one after another share it.

    arrivals: int32 [num_work_items, num_kv_heads], all zero between launches. partial_acc: float32 [2 * num_work_items,
    num_kv_heads, queries * group, head_dim]: normalised outputs of pieces, 2s + 1 for the one that begins a run in item
    s, 2s for the one that goes on with an earlier item's. partial_lse: float32 [2 * num_work_items, num_kv_heads,
    queries * group]: their log2-sum-exp2. tile: tokens per tile. queries: decodes of a run, at most.
    """

    num_kv_heads: int
    group: int
    queries: int
    head_dim: int
    tile: int
    num_work_items: int
    num_warps: int
    num_stages: int
    arrivals: torch.Tensor
    partial_acc: torch.Tensor
    partial_lse: torch.Tensor


@dataclass(frozen=True)
class DecodePlan:
    """Who attends to what, for one sliding window, as written by `plan_decode_attention`: see `_plan_kernel` for the
    tensors (int32).
    """

    workspace: DecodeWorkspace
    max_sequences: int
    sliding_window: int
    line: torch.Tensor
    starts: torch.Tensor
    records: torch.Tensor


def make_decode_workspace(
    num_q_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype, device: torch.device,
    *, queries: int = 1, tile: int | None = None, programs_per_multiprocessor: int | None = None,
    num_warps: int | None = None, num_stages: int | None = None,
) -> DecodeWorkspace:  # fmt: skip
    """Allocate the scratch for a geometry. queries: decodes of a run, at most.
    The other keyword arguments override the tuned launch shape (tests, benchmarks).

    Raises ValueError if the query heads are no multiple of the KV heads.
    """
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    group = num_q_heads // num_kv_heads
    rows = group * queries
    multiprocessors = traits_of(device).num_multiprocessors
    tall = queries > 1 and rows > 16
    programs = programs_per_multiprocessor or (
        1 if tall else launched_programs(multiprocessors, num_kv_heads, head_dim, kv_dtype)
    )
    num_work_items = max(1, programs * multiprocessors // num_kv_heads)
    key_bytes = triton.next_power_of_2(head_dim) * kv_dtype.itemsize
    tuned = _tall_shape(rows, key_bytes, kv_dtype) if tall else _shape(rows, key_bytes, programs)
    return DecodeWorkspace(
        num_kv_heads=num_kv_heads,
        group=group,
        queries=queries,
        head_dim=head_dim,
        tile=tile or tuned[0],
        num_work_items=num_work_items,
        num_warps=num_warps or tuned[1],
        num_stages=num_stages or tuned[2],
        arrivals=torch.zeros(num_work_items, num_kv_heads, dtype=torch.int32, device=device),
        partial_acc=torch.empty(2 * num_work_items, num_kv_heads, rows, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_work_items, num_kv_heads, rows, dtype=torch.float32, device=device),
    )


def _shape(rows: int, key_bytes: int, programs: int) -> tuple[int, int, int]:
    """Tokens of a tile, warps and stages, for rows of queries and so many bytes of a token's keys."""
    # Fewer, larger steps: on an H200, whose memory is faster than steps of half the size with four warps are, 32
    # sequences of 2,048 tokens take 66 us instead of 75, 256 of 1,024 251 instead of 291
    # (tests/bench/bench_decode_attention.py --pdl). With more rows the tensor cores read all keys and values from
    # shared memory, where four such tiles would not fit
    wide = programs == 1 and rows <= 16
    # So many stages that no more programs than these fit on a multiprocessor: a launch that begins while another runs
    # would else crowd some of them.
    return max(16, (32768 if wide else 16384) // key_bytes), 8 if wide else 4, 4 if programs == 1 and not wide else 3


def _tall_shape(rows: int, key_bytes: int, kv_dtype: torch.dtype) -> tuple[int, int, int]:
    """The same for runs of many rows, whose sums take the registers of eight warps, and so a multiprocessor to a
    program: what spills nothing (tests/bench/compile_decode_attention.py). Not timed yet.
    """
    if kv_dtype.itemsize == 1:
        return max(16, min(64, 8192 // key_bytes)), 8, 4
    return max(16, 16384 // key_bytes), 8, 4 if rows <= 32 else 3  # queries are on their way, too


def packed_queries(group: int, head_dim: int, num_drafts: int) -> int:
    """How many decodes of a sequence that has so many drafts are attended to at once, which read its keys and values
    once: all of them, or where they and the query heads of a KV head are too many, so many that the runs are about
    equal. 1: each for itself, as without drafts.
    """
    most = max(_MOST_ROWS * 128 // max(triton.next_power_of_2(head_dim), 128) // group, 1)
    return -(-(1 + num_drafts) // -(-(1 + num_drafts) // most))


def launched_programs(multiprocessors: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> int:
    """Of ordinary decodes on a multiprocessor. One, which draws on memory most evenly and leaves the fewest pieces to
    merge, unless the heads then leave a tenth of the multiprocessors idle. Two for short heads: a tile of them has
    twice the tokens, and softmax takes longer than their keys and values; and for numbers of 8 bits.
    """
    if kv_dtype.itemsize == 1:
        return 2
    return 1 if multiprocessors // num_kv_heads * num_kv_heads >= 0.9 * multiprocessors and head_dim > 64 else 2


def make_decode_plan(workspace: DecodeWorkspace, max_sequences: int, sliding_window: int = 0) -> DecodePlan:
    """Allocate a plan for up to `max_sequences` rows and one sliding window (tokens; 0 = none)."""
    device = workspace.arrivals.device
    return DecodePlan(
        workspace=workspace,
        max_sequences=max_sequences,
        sliding_window=sliding_window,
        line=torch.zeros(2, dtype=torch.int32, device=device),
        starts=torch.zeros(workspace.num_work_items, RECORD_WORDS.value, dtype=torch.int32, device=device),
        records=torch.zeros(max_sequences + 2, 2, dtype=torch.int32, device=device),
    )


def plan_decode_attention(seq_lens: torch.Tensor, plan: DecodePlan, rows: torch.Tensor | None = None) -> None:
    """Write `plan` for a step's lengths: int32 [num_sequences] on the device, the current token included, 0 = padding
    row.

    rows: int32 [num_sequences] whose each is: neighbours with one row are a sequence's newest tokens, each a token
    longer than the one before it. To be given if and only if the plan's workspace has more than one query to a run.
    Raises ValueError if it is not so, or if there are more sequences than the plan was made for.
    """
    num_sequences, workspace = seq_lens.shape[0], plan.workspace
    if num_sequences > plan.max_sequences:
        raise ValueError(f"{num_sequences} sequences, but the plan holds {plan.max_sequences}")
    if (rows is None) != (workspace.queries == 1) or (rows is not None and rows.shape != seq_lens.shape):
        raise ValueError(f"{workspace.queries} queries to a run, and rows do not fit: {num_sequences} decodes, {rows}")
    items = 8  # places a program
    _plan_kernel[(triton.cdiv(workspace.num_work_items, items),)](
        seq_lens, rows, plan.line, plan.starts, plan.records, num_sequences, workspace.num_work_items,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SEQUENCES=triton.next_power_of_2(max(num_sequences, 16)),
        ITEMS=items, QUERIES=workspace.queries,
    )  # fmt: skip
