"""From logits to tokens without a sort, the vocabulary split over programs: argmax, seeded sampling, log-probabilities,
the n most likely tokens.

A row of logits is cut into chunks, one program each. A program leaves its chunk's result in the workspace; the last of
a row to arrive merges them in the order of the chunks and sets the row's counter back to zero. Chunks have one size
whatever the batch, so a row's result does not depend on the rows beside it. Which tokens may be drawn is a threshold
per row (truncation.py); penalties, biases and bad words change the logits before (logit_edits.py).

Sources: Gumbel-max with a counter-based hash as written down in reference.sample; splitmix64, Steele et al., 2014;
    murmur3's finaliser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin

MAX_TOP = 20  # of top_logprobs; fits in TOP_PAD
TOP_PAD = 32


@triton.jit
def order_of(x):
    """int32 keys that order as float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def arrive(arrivals, num_chunks):
    """Whether this program is the last of its row: then the others' results can be read, past the L1 cache."""
    tl.debug_barrier()  # every thread's stores are before the release below
    return tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_chunks - 1


@triton.jit
def _fmix32(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _row_key(seed, position):
    """uint64 of reference.sample: what a row's random numbers hang on."""
    z = seed.to(tl.uint64, bitcast=True) + (position.to(tl.int64) + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _token_hash(key, token):
    """uint32 h(token) of reference.sample."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return _fmix32(_fmix32(token.to(tl.uint32) * 0x9E3779B1 + low) ^ high)


@triton.jit
def _log2(x, ON_GPU: tl.constexpr):
    """To 2^-22, absolutely near 1 and relatively elsewhere: one instruction on the GPU instead of twenty."""
    if ON_GPU:
        return tl.extra.cuda.libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _gumbel(hashed, ON_GPU: tl.constexpr):
    """-log E of reference.sample, to 1e-5: E = -log(1 - v) by its series where 1 - v would lose v's digits."""
    v = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * (0.25 + v * 0.2))))
    e = tl.where(v < 0.03125, series, _log2(1.0 - v, ON_GPU) * -0.6931471805599453)
    return _log2(e, ON_GPU) * -0.6931471805599453


@triton.jit
def _race(
    row, begin, temperature, key, threshold,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, TRUNCATED: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """The best score of a chunk and its token: logit / temperature plus noise, or the logit alone at temperature 0.

    In tiles, to need few registers.
    """
    cooled = 1.0 / tl.where(temperature > 0, temperature, 1.0)
    TILE: tl.constexpr = 1024 if CHUNK > 1024 else CHUNK
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_token = begin + tl.arange(0, TILE)
    for offset in range(0, CHUNK, TILE):
        token = begin + offset + tl.arange(0, TILE)
        score = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        allowed = temperature > 0
        if TRUNCATED:
            score = tl.where(score >= threshold, score, float("-inf"))
            allowed = allowed & (tl.max(score, 0) > float("-inf"))  # most tiles have nothing that may be drawn
        if allowed:
            score = score * cooled + _gumbel(_token_hash(key, token), ON_GPU)
        best_token = tl.where(score > best, token, best_token)
        best = tl.maximum(score, best)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, best_token, VOCAB - 1), 0)
    return highest, token


@triton.jit
def mass_below(x, top):
    """Sum of exp(x - top), 0 if there is nothing but -inf."""
    return tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), 0)


@triton.jit
def merge_log_mass(partial, chunk, num_chunks):
    """log of the sum of exp over a row from its chunks' (maximum, mass)."""
    tops = tl.load(partial + chunk * 2, mask=chunk < num_chunks, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(partial + chunk * 2 + 1, mask=chunk < num_chunks, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(masses * tl.exp(tops - top), 0))


@kernel(unaligned=["rows", "temperature", "seeds", "positions", "thresholds", "tokens", "logprobs"])
def _choose_kernel(
    logits, rows, temperature, seeds, positions, thresholds, tokens, logprobs, arrivals, best_scores, best_tokens,
    masses, logits_stride, temperature_stride, seeds_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    RANDOM: tl.constexpr, GIVEN: tl.constexpr, TRUNCATED: tl.constexpr, HAS_ROWS: tl.constexpr,
    ON_GPU: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    part = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    state = m
    if HAS_ROWS:
        state = tl.load(rows + m).to(tl.int64)
        if state < 0:
            if part == 0:
                tl.store(tokens + m, 0)
            return
    row = logits + m * logits_stride
    if RANDOM:
        t = tl.load(temperature + state * temperature_stride)
        threshold = float("-inf")
        if TRUNCATED:
            threshold = tl.load(thresholds + m)
        key = _row_key(tl.load(seeds + state * seeds_stride), tl.load(positions + m))
        best, best_token = _race(row, part * CHUNK, t, key, threshold, VOCAB, CHUNK, TRUNCATED, ON_GPU)
    else:
        token = part * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        best, where = tl.max(x, 0, return_indices=True)
        # where nothing but NaN is, a lane behind the vocabulary may be the winner
        best_token = tl.minimum(part * CHUNK + where, VOCAB - 1)
    if GIVEN:  # a token is there already: its log-probability is asked
        tl.store(masses + (m * CHUNKS + part) * 2, best)
        tl.store(masses + (m * CHUNKS + part) * 2 + 1, mass_below(x, best))
    else:
        tl.store(best_scores + m * CHUNKS + part, best)
        tl.store(best_tokens + m * CHUNKS + part, best_token)

    if arrive(arrivals + m, CHUNKS):
        chunk = tl.arange(0, CHUNKS_PAD)
        if GIVEN:
            raw = tl.load(row + tl.load(tokens + m).to(tl.int32)).to(tl.float32)
            tl.store(logprobs + m, raw - merge_log_mass(masses + m * CHUNKS * 2, chunk, CHUNKS))
        else:
            bests = tl.load(
                best_scores + m * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"), cache_modifier=".cg"
            )
            of_chunk = tl.load(best_tokens + m * CHUNKS + chunk, mask=chunk < CHUNKS, other=0, cache_modifier=".cg")
            _, which = tl.max(bests, 0, return_indices=True)
            tl.store(tokens + m, tl.sum(tl.where(chunk == which, of_chunk, 0), 0).to(tokens.dtype.element_ty))
        tl.store(arrivals + m, 0)


@dataclass(frozen=True)
class SamplingWorkspace:
    """Scratch of sampling up to max_rows rows of vocab_size logits; launches that run one after another share it.

    arrivals: int32 [max_rows], zero between launches. best_scores float32, best_tokens int32 [max_rows, chunks]: a
    chunk's winner. masses: float32 [max_rows, chunks, 2]: its maximum and sum of exp(logit - maximum). candidates:
    int64 [max_rows, chunks, 32]: its largest. For truncation.py: search, pivots: int32 [max_rows, 8]; levels: float32
    [max_rows, 4]; above: float32 [max_rows, chunks, 16]; gathered: float32 [max_rows, chunk].
    """

    max_rows: int
    vocab_size: int
    chunk: int
    arrivals: torch.Tensor
    best_scores: torch.Tensor
    best_tokens: torch.Tensor
    masses: torch.Tensor
    candidates: torch.Tensor
    search: torch.Tensor
    pivots: torch.Tensor
    levels: torch.Tensor
    above: torch.Tensor
    gathered: torch.Tensor

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.vocab_size, self.chunk)


def make_sampling_workspace(
    max_rows: int, vocab_size: int, device: torch.device, *, chunk: int = 4096
) -> SamplingWorkspace:
    """Allocate it; 256 rows of 128,256 tokens take 7 MB. chunk: tokens per program, a power of two from 16 to 4096
    (smaller ones are for tests).

    Raises ValueError for another chunk.
    """
    if chunk & (chunk - 1) or not 16 <= chunk <= 4096:
        raise ValueError(f"chunk {chunk} is no power of two from 16 to 4096")
    chunks = triton.cdiv(vocab_size, chunk)

    def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(max_rows, *shape, dtype=dtype, device=device)

    return SamplingWorkspace(
        max_rows=max_rows, vocab_size=vocab_size, chunk=chunk,
        arrivals=scratch(dtype=torch.int32), best_scores=scratch(chunks, dtype=torch.float32),
        best_tokens=scratch(chunks, dtype=torch.int32), masses=scratch(chunks, 2, dtype=torch.float32),
        candidates=scratch(chunks, TOP_PAD, dtype=torch.int64), search=scratch(8, dtype=torch.int32),
        pivots=scratch(8, dtype=torch.int32), levels=scratch(4, dtype=torch.float32),
        above=scratch(chunks, 16, dtype=torch.float32), gathered=scratch(chunk, dtype=torch.float32),
    )  # fmt: skip


def argmax(
    logits: torch.Tensor, *, workspace: SamplingWorkspace, out: torch.Tensor | None = None, launch_pdl: bool = False
) -> torch.Tensor:
    """out[m] = the most likely token of row m, the smallest of equals.

    logits: [M, V], any floating dtype, rows contiguous, may be strided. out: [M] int32 or int64 (made as int64).
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
    is complete. Raises ValueError if logits do not fit the workspace.
    """
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    _choose(logits, None, None, None, None, None, out, None, workspace, launch_pdl)
    return out


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, *,
    workspace: SamplingWorkspace, thresholds: torch.Tensor | None = None, rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out[m] = a token drawn from softmax(logits[m] / temperature), the same for the same seed and position:
    reference.sample's race. 0: the most likely one.

    logits, out, launch_pdl: as in `argmax`. positions: integers [M].
    temperature: float32, seeds: int64, may be strided: [M], or [R] if rows [M] says which entry is row m's (-1:
    padding, out[m] is 0). thresholds: float32 [M], smaller logits are not drawn (truncation_thresholds). Raises
    ValueError if logits do not fit the workspace.
    """
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    _choose(logits, rows, temperature, seeds, positions, thresholds, out, None, workspace, launch_pdl)
    return out


def logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    workspace: SamplingWorkspace,
    out: torch.Tensor | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:
    """out[m] = log softmax(logits[m]) at token_ids[m]: [M, V], [M] integers -> [M] float32. As `argmax` otherwise."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device) if out is None else out
    _choose(logits, None, None, None, None, None, token_ids, out, workspace, launch_pdl)
    return out


def check_logits(logits: torch.Tensor, workspace: SamplingWorkspace, *dense: torch.Tensor | None) -> None:
    """Raises ValueError if the workspace is not made for these logits, or one of the others is no [M] without gaps."""
    if logits.ndim != 2 or logits.shape[1] != workspace.vocab_size or len(logits) > workspace.max_rows:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit a workspace of {workspace.max_rows} rows of "
            f"{workspace.vocab_size}"
        )
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    if any(tensor is not None and (tensor.shape != (len(logits),) or not tensor.is_contiguous()) for tensor in dense):
        raise ValueError(f"expected one entry per row of logits {tuple(logits.shape)}, without gaps")


def _choose(
    logits: torch.Tensor, rows: torch.Tensor | None, temperature: torch.Tensor | None, seeds: torch.Tensor | None,
    positions: torch.Tensor | None, thresholds: torch.Tensor | None, tokens: torch.Tensor,
    logprobs: torch.Tensor | None, workspace: SamplingWorkspace, launch_pdl: bool,
) -> None:  # fmt: skip
    """Writes tokens, or with logprobs those of the tokens that are there."""
    check_logits(logits, workspace, rows, positions, thresholds, tokens, logprobs)
    if len(logits) == 0:
        return
    unused = workspace.arrivals
    _choose_kernel[(workspace.chunks, len(logits))](
        logits, *(unused if tensor is None else tensor for tensor in (rows, temperature, seeds, positions, thresholds)),
        tokens, unused if logprobs is None else logprobs, workspace.arrivals, workspace.best_scores,
        workspace.best_tokens, workspace.masses, logits.stride(0),
        *(0 if tensor is None else tensor.stride(0) for tensor in (temperature, seeds)),
        VOCAB=workspace.vocab_size, CHUNK=workspace.chunk, CHUNKS=workspace.chunks,
        CHUNKS_PAD=triton.next_power_of_2(workspace.chunks), RANDOM=temperature is not None, GIVEN=logprobs is not None,
        TRUNCATED=thresholds is not None, HAS_ROWS=rows is not None, ON_GPU=logits.is_cuda, LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )  # fmt: skip
