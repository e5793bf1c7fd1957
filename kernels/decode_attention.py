"""Paged decode attention: one new token per sequence against its keys and values in the page pool.

The picture. Every sequence is cut into tiles of `tile` tokens and all tiles lie in one line. Slot s of a fixed number of slots walks tiles
[s * share, (s + 1) * share) of that line, for each KV head in a program of its own, in one software-pipelined loop that runs on across the borders of
sequences, so the memory pipe never drains. A sequence that lies in one slot goes straight to `out`; pieces of a sequence that several slots share go to a
workspace, and the last of its programs to arrive merges them by log-sum-exp, in the line's order, so results do not depend on who came last.

    line    | sequence 0 (8 tiles) | 1 (3)  |   sequence 2 (6)   |  ...
    slots   |   s0    |    s1    |    s2    |    s3    |             s1 finishes sequence 0 with s0, does all of 1, and begins 2

The programs of a slot read the same pages at the same time, each its head: a page's heads are neighbours in memory.

`plan_decode_attention` derives the line from the device's lengths once per step (and per sliding window); all layers share the plan. No length is ever read
by the host, the grid is fixed and nothing is allocated: both launches can be captured in a CUDA graph.

Sources: split over KV: Flash-Decoding (Dao et al., 2023); the line cut in equal shares: Stream-K (Osama et al., 2023), FlashInfer (Ye et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634


@triton.jit
def _first_token(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the first tile begins of a sequence whose last position is length - 1: at its first visible position or less than a tile before."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE * TILE
    return first


@triton.jit
def _num_tiles(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    return (length - _first_token(length, TILE, WINDOW) + TILE - 1) // TILE


@triton.jit
def _visible(base, length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Which tokens of the tile that begins at position `base` are to be read: [TILE]."""
    token = tl.arange(0, TILE)
    visible = token < length - base
    if WINDOW > 0:
        visible = visible & (token >= length - WINDOW - base)
    return visible


@triton.jit
def _load_pages(pages, base, length, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The page ids of a tile's tokens: [TILE], or one if a page holds whole tiles. Nothing is read if length is 0."""
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + base // PAGE_SIZE, mask=length > 0, other=0)
    else:
        page = tl.load(pages + base // PAGE_SIZE + tl.arange(0, TILE) // PAGE_SIZE, mask=_visible(base, length, TILE, WINDOW), other=0)
    return page


@triton.jit
def _locate(place, begins, ends, length, record, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """What lies at each `place` [places] of the line: record, sequence, its length, tile in it, its number of tiles."""
    here = (begins[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
    seq = tl.sum(tl.where(here, tl.arange(0, length.shape[0])[None, :], 0), 1)
    of_length = tl.sum(tl.where(here, length[None, :], 0), 1)
    tile = place - tl.sum(tl.where(here, begins[None, :], 0), 1)
    return tl.sum(tl.where(here, record[None, :], 0), 1), seq, of_length, tile, _num_tiles(of_length, TILE, WINDOW)


@triton.jit(do_not_specialize=["num_sequences", "num_slots"])
def _plan_kernel(
    seq_lens, line, starts, records, num_sequences, num_slots,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Each program places SLOTS slots on the line; the first one also writes the records.

    line: [2] tiles per slot, tiles in the line. records: [sequences, 2] id and length of the non-empty sequences, in order.
    starts: [slots, 8] where a slot begins: record, sequence, length, tile; the sequence it begins inside of is shared by slots [4] to [5]; the sequence that
    it begins and stops inside of is [6] and shared up to slot [7], which is the slot itself if there is none.
    """
    part = tl.program_id(0)
    seq = tl.arange(0, SEQUENCES)
    length = tl.load(seq_lens + seq, mask=seq < num_sequences, other=0)
    tiles = _num_tiles(length, TILE, WINDOW)
    ends = tl.cumsum(tiles, 0)
    begins = ends - tiles
    filled = (length > 0).to(tl.int32)
    record = tl.cumsum(filled, 0) - filled
    total = tl.sum(tiles, 0)
    share = tl.maximum((total + num_slots - 1) // num_slots, 1)

    slot = part * SLOTS + tl.arange(0, SLOTS)
    mine = slot < num_slots
    place = slot * share
    at_record, at_seq, at_length, at_tile, at_tiles = _locate(place, begins, ends, length, record, TILE, WINDOW)
    cell = starts + slot * 8
    tl.store(cell + 0, at_record, mask=mine)
    tl.store(cell + 1, at_seq, mask=mine)
    tl.store(cell + 2, at_length, mask=mine)
    tl.store(cell + 3, at_tile, mask=mine)
    tl.store(cell + 4, (place - at_tile) // share, mask=mine)
    tl.store(cell + 5, (place - at_tile + at_tiles - 1) // share, mask=mine)
    last = tl.minimum(place + share, total) - 1
    _, at_seq, _, at_tile, at_tiles = _locate(last, begins, ends, length, record, TILE, WINDOW)
    begin = last - at_tile
    tl.store(cell + 6, at_seq, mask=mine)
    tl.store(cell + 7, tl.where(begin >= place, (begin + at_tiles - 1) // share, slot), mask=mine)
    if part == 0:
        tl.store(line, share)
        tl.store(line + 1, total)
        tl.store(records + record * 2, seq, mask=filled > 0)
        tl.store(records + record * 2 + 1, length, mask=filled > 0)


@triton.jit
def _merge(
    first_slot, last_slot, head, out_rows, partial_acc, partial_lse,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh a sequence's partial outputs by their softmax mass, PARTS at a time: [PARTS, GROUP_PAD, HEAD_PAD] float32.

    Little code: it runs once, at the end, where every line of it is an instruction cache miss.
    """
    row = tl.minimum(tl.arange(0, GROUP_PAD), GROUP - 1)
    dim = tl.arange(0, HEAD_PAD)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for slot in range(first_slot, last_slot + 1, PARTS):
        at = slot + tl.arange(0, PARTS)
        there = at <= last_slot
        piece = (tl.where(at == first_slot, 2 * at + 1, 2 * at) * HEADS + head)[:, None] * GROUP + row[None, :]
        part = tl.load(
            partial_acc + piece[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=there[:, None, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        lse = tl.load(partial_lse + piece, mask=there[:, None], other=float("-inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - new_top[None, :])
        fade = tl.exp2(top - new_top)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * part, 0)
        mass = mass * fade + tl.sum(weight, 0)
        top = new_top
    rows = tl.arange(0, GROUP_PAD)
    where = out_rows + rows[:, None] * HEAD_DIM + dim[None, :]
    tl.store(where, (acc * (1.0 / mass)[:, None]).to(out_rows.dtype.element_ty), mask=(rows < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q, kv_pages, page_table, out, line, starts, records, arrivals, partial_acc, partial_lse,
    scale, soft_cap, q_stride, out_stride, table_stride,
    HEADS: tl.constexpr, PAGE_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PLAN_SETTLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if LAUNCH_PDL and not PLAN_SETTLED:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    share = tl.load(line)
    count = tl.minimum(tl.load(line + 1) - slot * share, share)
    if count <= 0:
        return
    record = tl.load(starts + slot * 8 + 0)
    seq = tl.load(starts + slot * 8 + 1)
    length = tl.load(starts + slot * 8 + 2)
    tile = tl.load(starts + slot * 8 + 3)
    first_seq = seq
    first_slot = tl.load(starts + slot * 8 + 4)
    first_last_slot = tl.load(starts + slot * 8 + 5)
    last_seq = tl.load(starts + slot * 8 + 6)
    last_slot = tl.load(starts + slot * 8 + 7)
    q += head * (GROUP * HEAD_DIM)
    out += head * (GROUP * HEAD_DIM)
    kv_pages += head * HEAD_STRIDE

    token = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_PAD)
    row = tl.arange(0, ROWS)
    in_head = (dim < HEAD_DIM)[None, :]
    in_group = (row < GROUP)[:, None]
    q_offset = tl.minimum(row, GROUP - 1)[:, None] * HEAD_DIM + dim[None, :]
    in_page = kv_pages + ((token % PAGE_SIZE) * HEAD_DIM)[:, None] + dim[None, :]  # a tile begins at a multiple of TILE

    base = _first_token(length, TILE, WINDOW) + tile * TILE
    page = _load_pages(page_table + seq.to(tl.int64) * table_stride, base, length, PAGE_SIZE, TILE, WINDOW)
    next_seq = tl.load(records + (record + 1) * 2)
    next_length = tl.load(records + (record + 1) * 2 + 1)

    if LAUNCH_PDL:
        if PLAN_SETTLED:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    top = tl.full([ROWS], float("-inf"), tl.float32)
    masses = tl.zeros([ROWS, TILE], tl.float32)  # summed over its columns only when a sequence ends: a reduction across warps costs three barriers
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    came_last = first_slot * 0
    for step in range(count):
        now_seq, now_length, now_tile, now_base, now_page = seq, length, tile, base, page
        # The tile after this one. Its page ids are read before this tile's keys: loads return in order, and a load behind them would come too late.
        ends = base + TILE >= length
        tile = tl.where(ends, 0, tile + 1)
        record = tl.where(ends, record + 1, record)
        seq = tl.where(ends, next_seq, seq)
        length = tl.where(ends, next_length, length)
        base = tl.where(ends, _first_token(length, TILE, WINDOW), base + TILE)
        pages = page_table + seq.to(tl.int64) * table_stride
        page = _load_pages(pages, base, tl.where(step + 1 < count, length, 0), PAGE_SIZE, TILE, WINDOW)
        next_seq = tl.load(records + (record + 1) * 2)
        next_length = tl.load(records + (record + 1) * 2 + 1)

        visible = _visible(now_base, now_length, TILE, WINDOW)
        if PAGE_SIZE >= TILE:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE + (now_base % PAGE_SIZE) * HEAD_DIM)
        else:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE)[:, None]
        queries = tl.load(q + now_seq.to(tl.int64) * q_stride + q_offset, mask=in_head, other=0.0)
        keys = tl.load(where, mask=visible[:, None] & in_head, other=0.0, eviction_policy="evict_first")
        values = tl.load(where + VALUE_STRIDE, mask=visible[:, None] & in_head, other=0.0, eviction_policy="evict_first")

        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * 1.4426950408889634) / soft_cap)) + 1.0)) * 1.4426950408889634
        else:
            scores = scores * (scale * 1.4426950408889634)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        masses = masses * fade[:, None] + weights
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = new_top

        if ends | (step + 1 == count):
            begins = now_tile <= step
            mass = tl.sum(masses, 1)
            result = acc * (1.0 / mass)[:, None]
            if ends & begins:
                target = out + now_seq.to(tl.int64) * out_stride
                tl.store(target + row[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=in_group & in_head)
            else:
                piece = ((2 * slot + begins.to(tl.int32)) * HEADS + head) * GROUP
                tl.store(partial_lse + piece + row, top + tl.log2(mass), mask=row < GROUP)
                tl.store(partial_acc + (piece + row[:, None]) * HEAD_DIM + dim[None, :], result, mask=in_group & in_head)
                tl.debug_barrier()  # every thread's partial stores come before the release
                earlier = tl.atomic_add(arrivals + tl.where(begins, slot, first_slot) * HEADS + head, 1, sem="acq_rel", scope="gpu")
                if begins:
                    came_last += (earlier == last_slot - slot).to(tl.int32) * 2
                else:
                    came_last += (earlier == first_last_slot - first_slot).to(tl.int32)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            masses = tl.zeros([ROWS, TILE], tl.float32)
            acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)

    # The last of a sequence's programs to come merges its pieces and leaves the counter at zero for the next launch: of the sequence this slot began inside
    # of (1), and of the one it stopped inside of (2).
    if came_last > 0:
        for turn in range(1, 3):
            if (came_last & turn) > 0:
                first = tl.where(turn == 1, first_slot, slot)
                target = out + tl.where(turn == 1, first_seq, last_seq).to(tl.int64) * out_stride
                _merge(first, tl.where(turn == 1, first_last_slot, last_slot), head, target, partial_acc, partial_lse,
                       HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, PARTS)  # fmt: skip
                tl.store(arrivals + first * HEADS + head, 0)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one model's decode attention on one device; layers that run one after another share it.

    arrivals: int32 [num_slots, num_kv_heads], all zero between launches. partial_acc: float32 [2 * num_slots, num_kv_heads, group, head_dim]: normalised
    outputs of pieces, 2s + 1 for the one that begins a sequence in slot s, 2s for the one that goes on with an earlier slot's. partial_lse: float32
    [2 * num_slots, num_kv_heads, group]: their log2-sum-exp2. tile: tokens per tile.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    tile: int
    num_slots: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    arrivals: torch.Tensor
    partial_acc: torch.Tensor
    partial_lse: torch.Tensor


@dataclass(frozen=True)
class DecodePlan:
    """Who attends to what, for one sliding window, as written by `plan_decode_attention`: see `_plan_kernel` for the tensors (int32)."""

    workspace: DecodeWorkspace
    max_sequences: int
    sliding_window: int
    line: torch.Tensor
    starts: torch.Tensor
    records: torch.Tensor


def make_decode_workspace(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
    *, tile: int | None = None, programs_per_multiprocessor: int | None = None, num_warps: int = 4, num_stages: int | None = None,
    max_registers: int | None = None,
) -> DecodeWorkspace:  # fmt: skip
    """Allocate the scratch for a geometry; the keyword arguments override the tuned launch shape (tests, benchmarks).

    Raises ValueError if the query heads are no multiple of the KV heads.
    """
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    group = num_q_heads // num_kv_heads
    tuned_tile, tuned_programs, tuned_stages = _launch_shape(head_dim, dtype)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    num_slots = max(1, (programs_per_multiprocessor or tuned_programs) * multiprocessors // num_kv_heads)
    return DecodeWorkspace(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        tile=tile or tuned_tile,
        num_slots=num_slots,
        num_warps=num_warps,
        num_stages=num_stages or tuned_stages,
        max_registers=max_registers,
        arrivals=torch.zeros(num_slots, num_kv_heads, dtype=torch.int32, device=device),
        partial_acc=torch.empty(2 * num_slots, num_kv_heads, group, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_slots, num_kv_heads, group, dtype=torch.float32, device=device),
    )


def _launch_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(tile, programs per multiprocessor, stages): a tile of keys is 16 KiB."""
    tile = max(16, 16384 // (triton.next_power_of_2(head_dim) * dtype.itemsize))
    return tile, 2, 2


def make_decode_plan(workspace: DecodeWorkspace, max_sequences: int, sliding_window: int = 0) -> DecodePlan:
    """Allocate a plan for up to `max_sequences` rows and one sliding window (tokens; 0 = none)."""
    device = workspace.arrivals.device
    return DecodePlan(
        workspace=workspace,
        max_sequences=max_sequences,
        sliding_window=sliding_window,
        line=torch.zeros(2, dtype=torch.int32, device=device),
        starts=torch.zeros(workspace.num_slots, 8, dtype=torch.int32, device=device),
        records=torch.zeros(max_sequences + 2, 2, dtype=torch.int32, device=device),
    )


def plan_decode_attention(seq_lens: torch.Tensor, plan: DecodePlan) -> None:
    """Write `plan` for a step's lengths: int32 [num_sequences] on the device, the current token included, 0 = padding row.

    Raises ValueError if there are more sequences than the plan was made for.
    """
    num_sequences = seq_lens.shape[0]
    if num_sequences > plan.max_sequences:
        raise ValueError(f"{num_sequences} sequences, but the plan holds {plan.max_sequences}")
    workspace = plan.workspace
    slots = 8
    _plan_kernel[(triton.cdiv(workspace.num_slots, slots),)](
        seq_lens, plan.line, plan.starts, plan.records, num_sequences, workspace.num_slots,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SEQUENCES=triton.next_power_of_2(max(num_sequences, 16)), SLOTS=slots,
    )  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, plan: DecodePlan,
    *, scale: float, soft_cap: float = 0.0, launch_pdl: bool = False, plan_settled: bool = False,
) -> None:  # fmt: skip
    """out[s, h] = softmax(cap(q[s, h] . K[s] * scale)) . V[s] over the last `sliding_window` tokens of sequence s, as planned.

    q, out: [num_sequences, num_q_heads, head_dim], rows may be strided. kv_pages: [num_pages, 2, num_kv_heads, page_size, head_dim], keys then values, page_size
    a power of two. page_table: int32 [num_sequences, max_pages]; entries past a sequence's length are never read. All of one dtype (bfloat16, float16 or
    float32; sums in float32) and 16-byte aligned rows. Rows of length 0 are left as they are. cap(x) = soft_cap * tanh(x / soft_cap), or x if soft_cap is 0.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch), but read nothing before that kernel is complete; with plan_settled, the
    plan and the page table are read earlier: only for when neither was written by the kernel before, nor by one that it did not wait for.
    """
    workspace = plan.workspace
    page_size, head_dim = kv_pages.shape[3:]
    _check(q, kv_pages, page_table, out, workspace)
    group_pad, head_pad = triton.next_power_of_2(workspace.group), triton.next_power_of_2(head_dim)
    pdl = {"launch_pdl": True} if launch_pdl else {}
    _decode_kernel[(workspace.num_slots * workspace.num_kv_heads,)](
        q, kv_pages, page_table, out, plan.line, plan.starts, plan.records, workspace.arrivals, workspace.partial_acc, workspace.partial_lse,
        scale, soft_cap, q.stride(0), out.stride(0), page_table.stride(0),
        HEADS=workspace.num_kv_heads, PAGE_STRIDE=kv_pages.stride(0), VALUE_STRIDE=kv_pages.stride(1), HEAD_STRIDE=kv_pages.stride(2),
        GROUP=workspace.group, GROUP_PAD=group_pad, HEAD_DIM=head_dim, HEAD_PAD=head_pad, PAGE_SIZE=page_size,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SOFT_CAP=soft_cap != 0.0, ROWS=max(16, group_pad), PARTS=max(2, 8192 // (group_pad * head_pad)),
        LAUNCH_PDL=launch_pdl, PLAN_SETTLED=plan_settled, PRECISION="ieee",
        num_warps=workspace.num_warps, num_stages=workspace.num_stages, maxnreg=workspace.max_registers, **pdl,
    )  # fmt: skip


def _check(q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace) -> None:
    num_sequences, num_q_heads, head_dim = q.shape
    _, two, num_kv_heads, page_size, kv_head_dim = kv_pages.shape
    if (two, num_kv_heads, kv_head_dim) != (2, workspace.num_kv_heads, workspace.head_dim) or head_dim != kv_head_dim:
        raise ValueError(f"kv_pages {tuple(kv_pages.shape)} do not fit the workspace's {workspace.num_kv_heads} KV heads of {workspace.head_dim}")
    if num_q_heads != num_kv_heads * workspace.group or out.shape != q.shape or page_table.shape[0] != num_sequences:
        raise ValueError(f"q {tuple(q.shape)}, out {tuple(out.shape)} and page_table {tuple(page_table.shape)} do not fit each other or the workspace")
    if page_size & (page_size - 1):
        raise ValueError(f"page_size {page_size} is no power of two")
    if kv_pages.stride()[3:] != (head_dim, 1) or q.stride()[1:] != (head_dim, 1) or out.stride()[1:] != (head_dim, 1) or page_table.stride(1) != 1:
        raise ValueError("heads and pages must be contiguous")
    if not q.dtype == kv_pages.dtype == out.dtype:
        raise ValueError(f"q {q.dtype}, kv_pages {kv_pages.dtype} and out {out.dtype} must have one dtype")
