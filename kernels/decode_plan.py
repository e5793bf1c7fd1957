"""The line of tiles that `decode_attention` walks, cut into equal shares on the device from a step's lengths; and the
scratch memory that goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel

# A work item's record in `starts`, int32 [RECORD_WORDS]: where it begins on the line, and with which other work items
# it shares sequences.
RECORD_WORDS = tl.constexpr(8)
AT_RECORD = tl.constexpr(0)  # the place in `records` of the sequence that it begins in
AT_SEQ = tl.constexpr(1)  # that sequence's id,
AT_LENGTH = tl.constexpr(2)  # its length,
AT_TILE = tl.constexpr(3)  # and the tile of it that comes first
BEGUN_IN = tl.constexpr(4)  # the first work item that computes a part of that sequence,
BEGUN_TO = tl.constexpr(5)  # and the last
LAST_SEQ = tl.constexpr(6)  # the sequence in which it ends,
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
def num_tiles(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    return (length - first_token(length, TILE, WINDOW) + TILE - 1) // TILE


@triton.jit
def _locate(place, begins, ends, length, record, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """What lies at each `place` [places] of the line: record, sequence, its length, tile in it, its number of tiles."""
    here = (begins[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
    seq = tl.sum(tl.where(here, tl.arange(0, length.shape[0])[None, :], 0), 1)
    of_length = tl.sum(tl.where(here, length[None, :], 0), 1)
    tile = place - tl.sum(tl.where(here, begins[None, :], 0), 1)
    return tl.sum(tl.where(here, record[None, :], 0), 1), seq, of_length, tile, num_tiles(of_length, TILE, WINDOW)


@kernel(ints=["num_sequences", "num_work_items"], unaligned=["seq_lens"])
def _plan_kernel(
    seq_lens, line, starts, records, num_sequences, num_work_items,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Each program places ITEMS work items on the line; the first one also writes the records.

    line: [2] tiles of a work item, tiles in the line. records: [sequences, 2] id and length of the non-empty sequences,
    in order.
    starts: [work items, RECORD_WORDS], as above.
    """
    part = tl.program_id(0)
    seq = tl.arange(0, SEQUENCES)
    length = tl.load(seq_lens + seq, mask=seq < num_sequences, other=0)
    tiles = num_tiles(length, TILE, WINDOW)
    ends = tl.cumsum(tiles, 0)
    begins = ends - tiles
    filled = (length > 0).to(tl.int32)
    record = tl.cumsum(filled, 0) - filled
    total = tl.sum(tiles, 0)
    share = tl.maximum((total + num_work_items - 1) // num_work_items, 1)

    item = part * ITEMS + tl.arange(0, ITEMS)
    mine = item < num_work_items
    place = item * share
    at_record, at_seq, at_length, at_tile, at_tiles = _locate(place, begins, ends, length, record, TILE, WINDOW)
    cell = starts + item * RECORD_WORDS
    tl.store(cell + AT_RECORD, at_record, mask=mine)
    tl.store(cell + AT_SEQ, at_seq, mask=mine)
    tl.store(cell + AT_LENGTH, at_length, mask=mine)
    tl.store(cell + AT_TILE, at_tile, mask=mine)
    tl.store(cell + BEGUN_IN, (place - at_tile) // share, mask=mine)
    tl.store(cell + BEGUN_TO, (place - at_tile + at_tiles - 1) // share, mask=mine)
    last = tl.minimum(place + share, total) - 1
    _, at_seq, _, at_tile, at_tiles = _locate(last, begins, ends, length, record, TILE, WINDOW)
    begin = last - at_tile
    tl.store(cell + LAST_SEQ, at_seq, mask=mine)
    tl.store(cell + LAST_TO, tl.where(begin >= place, (begin + at_tiles - 1) // share, item), mask=mine)
    if part == 0:
        tl.store(line, share)
        tl.store(line + 1, total)
        tl.store(records + record * 2, seq, mask=filled > 0)
        tl.store(records + record * 2 + 1, length, mask=filled > 0)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one model's decode attention on one device; layers that run one after another share it.

    arrivals: int32 [num_work_items, num_kv_heads], all zero between launches. partial_acc: float32 [2 * num_work_items,
    num_kv_heads, group, head_dim]: normalised outputs of pieces, 2s + 1 for the one that begins a sequence in item s,
    2s for the one that goes on with an earlier item's. partial_lse: float32 [2 * num_work_items, num_kv_heads, group]:
    their log2-sum-exp2. tile: tokens per tile.
    """

    num_kv_heads: int
    group: int
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
    *, tile: int | None = None, programs_per_multiprocessor: int | None = None, num_warps: int | None = None,
    num_stages: int | None = None,
) -> DecodeWorkspace:  # fmt: skip
    """Allocate the scratch for a geometry; the keyword arguments override the tuned launch shape (tests, benchmarks).

    Raises ValueError if the query heads are no multiple of the KV heads.
    """
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    group = num_q_heads // num_kv_heads
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs = programs_per_multiprocessor or (
        2 if kv_dtype.itemsize == 1 else _programs_per_multiprocessor(multiprocessors, num_kv_heads, head_dim)
    )
    num_work_items = max(1, programs * multiprocessors // num_kv_heads)
    # Fewer, larger steps: on an H200, whose memory is faster than steps of half the size with four warps are, 32
    # sequences of 2,048 tokens take 66 us instead of 75, 256 of 1,024 251 instead of 291; a lone one of 8,192 takes 18
    # instead of 16.6 (tests/bench/bench_decode_attention.py --pdl). With more rows the tensor cores read all keys
    wide = programs == 1 and group <= 16
    # and values from shared memory, where four such tiles would not fit
    return DecodeWorkspace(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        # bytes of keys
        tile=tile or max(16, (32768 if wide else 16384) // (triton.next_power_of_2(head_dim) * kv_dtype.itemsize)),
        num_work_items=num_work_items,
        num_warps=num_warps or (8 if wide else 4),
        # So many that no more programs than these fit on a multiprocessor: a launch that begins while another runs
        # would else crowd some of them.
        num_stages=num_stages or (4 if programs == 1 and not wide else 3),
        arrivals=torch.zeros(num_work_items, num_kv_heads, dtype=torch.int32, device=device),
        partial_acc=torch.empty(2 * num_work_items, num_kv_heads, group, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_work_items, num_kv_heads, group, dtype=torch.float32, device=device),
    )


def _programs_per_multiprocessor(multiprocessors: int, num_kv_heads: int, head_dim: int) -> int:
    """One, which draws on memory most evenly and leaves the fewest pieces to merge, unless the heads then leave a tenth
    of the multiprocessors idle. Two for short heads: a tile of them has twice the tokens, and softmax takes longer than
    their keys and values.
    """
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


def plan_decode_attention(seq_lens: torch.Tensor, plan: DecodePlan) -> None:
    """Write `plan` for a step's lengths: int32 [num_sequences] on the device, the current token included, 0 = padding
    row.

    Raises ValueError if there are more sequences than the plan was made for.
    """
    num_sequences = seq_lens.shape[0]
    if num_sequences > plan.max_sequences:
        raise ValueError(f"{num_sequences} sequences, but the plan holds {plan.max_sequences}")
    workspace = plan.workspace
    items = 8  # places a program
    _plan_kernel[(triton.cdiv(workspace.num_work_items, items),)](
        seq_lens, plan.line, plan.starts, plan.records, num_sequences, workspace.num_work_items,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SEQUENCES=triton.next_power_of_2(max(num_sequences, 16)),
        ITEMS=items,
    )  # fmt: skip
