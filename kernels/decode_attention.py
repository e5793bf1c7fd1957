"""Paged decode attention: one new token per sequence against its keys and values in the page pool.

The picture. Every (sequence, KV head) is an *item*, cut into tiles of `tile` tokens. All items' tiles lie in one line, items in order of sequence, then head.
Program p of a fixed grid walks tiles [p * tiles_per_program, (p + 1) * tiles_per_program) of that line in one software-pipelined loop that runs on across
item borders, so the memory pipe never drains. A piece that is a whole item goes straight to `out`; pieces of an item that several programs share go to a
workspace, and the last of these programs to arrive merges them by log-sum-exp, in the items' order, so results do not depend on who came last.

    line      |  item 0 (8 tiles)   | 1 (3)  |    item 2 (6)   |  ...
    programs  |   p0    |    p1    |    p2    |    p3    |            p1 finishes item 0 with p0, does all of item 1 ...

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
def _first_token(length, WINDOW: tl.constexpr):
    """First visible position of a sequence whose last position is length - 1."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    return first


@triton.jit
def _num_tiles(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    return (length - _first_token(length, WINDOW) + TILE - 1) // TILE


@triton.jit
def _locate(place, begins, ends, length, record, num_kv_heads, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """What lies at each `place` [places] of the line: record, sequence, length, head, tile in the item, tiles of the item."""
    here = (begins[None, :] * num_kv_heads <= place[:, None]) & (place[:, None] < ends[None, :] * num_kv_heads)
    seq = tl.sum(tl.where(here, tl.arange(0, length.shape[0])[None, :], 0), 1)
    of_length = tl.sum(tl.where(here, length[None, :], 0), 1)
    inside = place - tl.sum(tl.where(here, begins[None, :], 0), 1) * num_kv_heads
    tiles = tl.maximum(_num_tiles(of_length, TILE, WINDOW), 1)
    return tl.sum(tl.where(here, record[None, :], 0), 1), seq, of_length, inside // tiles, inside % tiles, tiles


@triton.jit(do_not_specialize=["num_sequences", "num_programs", "num_kv_heads"])
def _plan_kernel(
    seq_lens, line, starts, records, num_sequences, num_programs, num_kv_heads,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Each program places PROGRAMS attention programs on the line; the first one also writes the records.

    line: [2] tiles per program, tiles in the line. records: [sequences, 2] id and length of the non-empty sequences, in order.
    starts: [programs, 10] where a program begins: record, sequence, length, head, tile; the item it begins inside of is shared by programs [5] to [6];
    the item it stops inside of, if it began that too, is of sequence [7], head [8] and shared up to program [9], which is the program itself if there is none.
    """
    part = tl.program_id(0)
    seq = tl.arange(0, SEQUENCES)
    length = tl.load(seq_lens + seq, mask=seq < num_sequences, other=0)
    tiles = _num_tiles(length, TILE, WINDOW)
    ends = tl.cumsum(tiles, 0)
    begins = ends - tiles
    filled = (length > 0).to(tl.int32)
    record = tl.cumsum(filled, 0) - filled
    total = tl.sum(tiles, 0) * num_kv_heads
    share = tl.maximum((total + num_programs - 1) // num_programs, 1)

    program = part * PROGRAMS + tl.arange(0, PROGRAMS)
    mine = program < num_programs
    place = program * share
    at_record, at_seq, at_length, at_head, at_tile, at_tiles = _locate(place, begins, ends, length, record, num_kv_heads, TILE, WINDOW)
    item = place - at_tile
    cell = starts + program * 10
    tl.store(cell + 0, at_record, mask=mine)
    tl.store(cell + 1, at_seq, mask=mine)
    tl.store(cell + 2, at_length, mask=mine)
    tl.store(cell + 3, at_head, mask=mine)
    tl.store(cell + 4, at_tile, mask=mine)
    tl.store(cell + 5, item // share, mask=mine)
    tl.store(cell + 6, (item + at_tiles - 1) // share, mask=mine)
    last = tl.minimum(place + share, total) - 1
    _, at_seq, _, at_head, at_tile, at_tiles = _locate(last, begins, ends, length, record, num_kv_heads, TILE, WINDOW)
    item = last - at_tile
    tl.store(cell + 7, at_seq, mask=mine)
    tl.store(cell + 8, at_head, mask=mine)
    tl.store(cell + 9, tl.where(item >= place, (item + at_tiles - 1) // share, program), mask=mine)
    if part == 0:
        tl.store(line, share)
        tl.store(line + 1, total)
        tl.store(records + record * 2, seq, mask=filled > 0)
        tl.store(records + record * 2 + 1, length, mask=filled > 0)


@triton.jit
def _merge(
    first_program, last_program, out_rows, partial_acc, partial_lse,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh the item's partial outputs by their softmax mass, PARTS at a time: [PARTS, GROUP_PAD, HEAD_PAD] float32."""
    row = tl.minimum(tl.arange(0, GROUP_PAD), GROUP - 1)
    dim = tl.arange(0, HEAD_PAD)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for program in range(first_program, last_program + 1, PARTS):
        at = program + tl.arange(0, PARTS)
        there = at <= last_program
        cell = (tl.where(at == first_program, 2 * at + 1, 2 * at)[:, None]) * GROUP + row[None, :]
        lse = tl.load(partial_lse + cell, mask=there[:, None], other=float("-inf"), cache_modifier=".cg")
        piece = tl.load(
            partial_acc + cell[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=there[:, None, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - new_top[None, :])
        fade = tl.exp2(top - new_top)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * piece, 0)
        mass = mass * fade + tl.sum(weight, 0)
        top = new_top
    rows = tl.arange(0, GROUP_PAD)
    where = out_rows + rows[:, None] * HEAD_DIM + dim[None, :]
    tl.store(where, (acc / mass[:, None]).to(out_rows.dtype.element_ty), mask=(rows < GROUP)[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def _arrive(
    first_program, last_program, out_rows, arrivals, partial_acc, partial_lse,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Count this program in at an item it shares; the last of the item's programs merges and leaves the counter at zero for the next launch."""
    tl.debug_barrier()  # every thread's partial stores come before the release below
    earlier = tl.atomic_add(arrivals + first_program, 1, sem="acq_rel", scope="gpu")
    if earlier == last_program - first_program:
        _merge(first_program, last_program, out_rows, partial_acc, partial_lse, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, PARTS)
        tl.store(arrivals + first_program, 0)


@triton.jit(do_not_specialize=["num_kv_heads", "table_stride"])
def _decode_kernel(
    q, kv_pages, page_table, out, line, starts, records, arrivals, partial_acc, partial_lse,
    scale, soft_cap,
    num_kv_heads, q_stride, out_stride, table_stride, page_stride, value_stride, head_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    share = tl.load(line)
    total = tl.load(line + 1)
    begin = program * share
    count = tl.minimum(total - begin, share)
    if count <= 0:
        return
    record = tl.load(starts + program * 10 + 0)
    seq = tl.load(starts + program * 10 + 1)
    length = tl.load(starts + program * 10 + 2)
    head = tl.load(starts + program * 10 + 3)
    tile = tl.load(starts + program * 10 + 4)
    first_seq, first_head, first_tile = seq, head, tile

    token = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_PAD)
    row = tl.arange(0, ROWS)
    in_head = (dim < HEAD_DIM)[None, :]
    in_group = (row < GROUP)[:, None]
    q_offset = tl.minimum(row, GROUP - 1)[:, None] * HEAD_DIM + dim[None, :]

    position = _first_token(length, WINDOW) + tile * TILE + token
    page = tl.load(page_table + seq.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=position < length, other=0)
    next_seq = tl.load(records + (record + 1) * 2)
    next_length = tl.load(records + (record + 1) * 2 + 1)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    masses = tl.zeros([ROWS, TILE], tl.float32)  # summed over its columns only when an item ends: a reduction across warps costs three barriers
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for step in range(0, count):
        now_seq, now_head, now_length, now_tile, now_position, now_page = seq, head, length, tile, position, page
        # The tile after this one. Its page ids are read before this tile's keys: loads return in order, and a load behind them would come too late.
        item_ends = (tile + 1) >= _num_tiles(length, TILE, WINDOW)
        sequence_ends = item_ends & (head + 1 == num_kv_heads)
        head = tl.where(sequence_ends, 0, tl.where(item_ends, head + 1, head))
        tile = tl.where(item_ends, 0, tile + 1)
        record = tl.where(sequence_ends, record + 1, record)
        seq = tl.where(sequence_ends, next_seq, seq)
        length = tl.where(sequence_ends, next_length, length)
        position = _first_token(length, WINDOW) + tile * TILE + token
        page = tl.load(page_table + seq.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=position < tl.where(step + 1 < count, length, 0), other=0)
        next_seq = tl.load(records + (record + 1) * 2)
        next_length = tl.load(records + (record + 1) * 2 + 1)

        valid = now_position < now_length
        cell = now_page.to(tl.int64) * page_stride + (now_head * head_stride + (now_position % PAGE_SIZE) * HEAD_DIM)
        where = kv_pages + cell[:, None] + dim[None, :]
        queries = tl.load(q + now_seq.to(tl.int64) * q_stride + now_head * (GROUP * HEAD_DIM) + q_offset, mask=in_head, other=0.0)
        keys = tl.load(where, mask=valid[:, None] & in_head, other=0.0, eviction_policy="evict_first")
        values = tl.load(where + value_stride, mask=valid[:, None] & in_head, other=0.0, eviction_policy="evict_first")

        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * 1.4426950408889634) / soft_cap)) + 1.0)) * 1.4426950408889634
        else:
            scores = scores * (scale * 1.4426950408889634)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        masses = masses * fade[:, None] + weights
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = new_top

        ends = (now_tile + 1) >= _num_tiles(now_length, TILE, WINDOW)
        if ends | (step + 1 == count):
            begins = now_tile <= step
            mass = tl.sum(masses, 1)
            result = acc / mass[:, None]
            if ends & begins:
                target = out + now_seq.to(tl.int64) * out_stride + now_head * (GROUP * HEAD_DIM)
                tl.store(target + row[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=in_group & in_head)
            else:
                slot = 2 * program + begins.to(tl.int32)
                tl.store(partial_lse + slot * GROUP + row, top + tl.log2(mass), mask=row < GROUP)
                tl.store(partial_acc + (slot * GROUP + row[:, None]) * HEAD_DIM + dim[None, :], result, mask=in_group & in_head)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            masses = tl.zeros([ROWS, TILE], tl.float32)
            acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)

    if first_tile > 0:  # began inside an item
        target = out + first_seq.to(tl.int64) * out_stride + first_head * (GROUP * HEAD_DIM)
        _arrive(tl.load(starts + program * 10 + 5), tl.load(starts + program * 10 + 6), target, arrivals, partial_acc, partial_lse,
                GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, PARTS)  # fmt: skip
    last_sharer = tl.load(starts + program * 10 + 9)
    if last_sharer > program:  # stopped inside an item begun here
        target = out + tl.load(starts + program * 10 + 7).to(tl.int64) * out_stride + tl.load(starts + program * 10 + 8) * (GROUP * HEAD_DIM)
        _arrive(program, last_sharer, target, arrivals, partial_acc, partial_lse, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, PARTS)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of one model's decode attention on one device; layers that run one after another share it.

    arrivals: int32 [num_programs], all zero between launches. partial_acc: float32 [2 * num_programs, group, head_dim]: normalised outputs of pieces, slot
    2p + 1 for the piece that begins an item in program p, 2p for the one that goes on with an earlier program's. partial_lse: float32
    [2 * num_programs, group]: their log2-sum-exp2. tile: tokens per tile.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    tile: int
    num_programs: int
    num_warps: int
    num_stages: int
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
) -> DecodeWorkspace:  # fmt: skip
    """Allocate the scratch for a geometry; the keyword arguments override the tuned launch shape (tests, benchmarks).

    Raises ValueError if the query heads are no multiple of the KV heads.
    """
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of {num_kv_heads} KV heads")
    group = num_q_heads // num_kv_heads
    tuned_tile, tuned_programs, tuned_stages = _launch_shape(head_dim, dtype)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    num_programs = (programs_per_multiprocessor or tuned_programs) * multiprocessors
    return DecodeWorkspace(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        tile=tile or tuned_tile,
        num_programs=num_programs,
        num_warps=num_warps,
        num_stages=num_stages or tuned_stages,
        arrivals=torch.zeros(num_programs, dtype=torch.int32, device=device),
        partial_acc=torch.empty(2 * num_programs, group, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * num_programs, group, dtype=torch.float32, device=device),
    )


def _launch_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(tile, programs per multiprocessor, stages): a tile of keys is 16 KiB."""
    tile = max(16, 16384 // (triton.next_power_of_2(head_dim) * dtype.itemsize))
    return tile, 2, 3


def make_decode_plan(workspace: DecodeWorkspace, max_sequences: int, sliding_window: int = 0) -> DecodePlan:
    """Allocate a plan for up to `max_sequences` rows and one sliding window (tokens; 0 = none)."""
    device = workspace.arrivals.device
    return DecodePlan(
        workspace=workspace,
        max_sequences=max_sequences,
        sliding_window=sliding_window,
        line=torch.zeros(2, dtype=torch.int32, device=device),
        starts=torch.zeros(workspace.num_programs, 10, dtype=torch.int32, device=device),
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
    programs = 16
    _plan_kernel[(triton.cdiv(workspace.num_programs, programs),)](
        seq_lens, plan.line, plan.starts, plan.records, num_sequences, workspace.num_programs, workspace.num_kv_heads,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SEQUENCES=triton.next_power_of_2(max(num_sequences, 16)), PROGRAMS=programs,
    )  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, plan: DecodePlan,
    *, scale: float, soft_cap: float = 0.0, launch_pdl: bool = False,
) -> None:  # fmt: skip
    """out[s, h] = softmax(cap(q[s, h] . K[s] * scale)) . V[s] over the last `sliding_window` tokens of sequence s, as planned.

    q, out: [num_sequences, num_q_heads, head_dim], rows may be strided. kv_pages: [num_pages, 2, num_kv_heads, page_size, head_dim], keys then values, page_size
    a power of two. page_table: int32 [num_sequences, max_pages]; entries past a sequence's length are never read. All of one dtype (bfloat16, float16 or
    float32; sums in float32) and 16-byte aligned rows. Rows of length 0 are left as they are. cap(x) = soft_cap * tanh(x / soft_cap), or x if soft_cap is 0.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel is complete.
    """
    workspace = plan.workspace
    page_size, head_dim = kv_pages.shape[3:]
    _check(q, kv_pages, page_table, out, workspace)
    group_pad, head_pad = triton.next_power_of_2(workspace.group), triton.next_power_of_2(head_dim)
    pdl = {"launch_pdl": True} if launch_pdl else {}
    _decode_kernel[(workspace.num_programs,)](
        q, kv_pages, page_table, out, plan.line, plan.starts, plan.records, workspace.arrivals, workspace.partial_acc, workspace.partial_lse,
        scale, soft_cap,
        workspace.num_kv_heads, q.stride(0), out.stride(0), page_table.stride(0), kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2),
        GROUP=workspace.group, GROUP_PAD=group_pad, HEAD_DIM=head_dim, HEAD_PAD=head_pad, PAGE_SIZE=page_size,
        TILE=workspace.tile, WINDOW=plan.sliding_window, SOFT_CAP=soft_cap != 0.0, ROWS=max(16, group_pad), PARTS=max(1, 8192 // (group_pad * head_pad)),
        LAUNCH_PDL=launch_pdl, PRECISION="ieee",
        num_warps=workspace.num_warps, num_stages=workspace.num_stages, **pdl,
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
