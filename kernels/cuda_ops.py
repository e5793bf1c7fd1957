"""The ops of `reference` by kernels, for one model on one CUDA device: what the decoder and the sampler call there.

Scratch memory is allocated once, here; a launch reads nothing back to the host, so a whole decode step can be captured as a CUDA graph.
Ops without a kernel of their own (dense products, which cuBLAS does best, and rarely used pieces of sampling) are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_kernels import activation, norm, reference, rope_kv, sampling
from paged_kernels.decode_attention import make_decode_plan, make_decode_workspace, paged_decode_attention, plan_decode_attention
from paged_kernels.prefill_attention import paged_prefill_attention


class CudaOps:
    """Keeps scratch memory and the plan of the step at hand; steps run one after another on one stream."""

    embedding = staticmethod(reference.embedding)
    linear = staticmethod(reference.linear)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    silu_mul = staticmethod(activation.silu_mul)
    rope_write_kv = staticmethod(rope_kv.rope_write_kv)
    add_bias = staticmethod(reference.add_bias)
    ban_bad_words = staticmethod(reference.ban_bad_words)
    apply_penalties = staticmethod(reference.apply_penalties)
    apply_temperature = staticmethod(reference.apply_temperature)
    truncate = staticmethod(reference.truncate)
    logprobs = staticmethod(reference.logprobs)
    top_logprobs = staticmethod(reference.top_logprobs)

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_windows: Sequence[int | None],
        vocab_size: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """sliding_windows: of the layers; each distinct one is planned once a step."""
        workspace = make_decode_workspace(num_heads, num_kv_heads, head_dim, dtype, device)
        self._plans = {window: make_decode_plan(workspace, max_sequences, window or 0) for window in dict.fromkeys(sliding_windows)}
        self._sampling = sampling.make_sampling_workspace(max_sequences, vocab_size, device)
        self._prefill: tuple[Tensor, Tensor, int] | None = None
        self._unit = torch.ones(max_sequences, dtype=torch.float32, device=device)

    def plan_attention(self, seq_lens: Tensor, query_starts: Tensor, num_decodes: int, max_query_len: int) -> None:
        """Divides a step's decoding sequences among the multiprocessors and notes where the others' queries are. seq_lens 0: padding."""
        if num_decodes:
            for plan in self._plans.values():
                plan_decode_attention(seq_lens[:num_decodes], plan)
        self._prefill = (query_starts[num_decodes:] - num_decodes, seq_lens[num_decodes:], max_query_len) if max_query_len else None

    def decode_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, seq_lens: Tensor, max_seq_len: int, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """reference.decode_attention for the lengths that were planned; rows of length 0 stay undefined."""
        out = torch.empty_like(q)
        paged_decode_attention(q, kv_pages, page_table, out, self._plans[sliding_window], scale=scale)
        return out

    def prefill_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, lens: Sequence[tuple[int, int]], scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """reference.prefill_attention for the queries that were planned."""
        assert self._prefill is not None, "plan_attention was told of no prefill"
        query_starts, seq_lens, max_query_len = self._prefill
        out = torch.empty_like(q)
        paged_prefill_attention(
            q, kv_pages, page_table, query_starts, seq_lens, out, max_query_len=max_query_len, scale=scale, sliding_window=sliding_window or 0
        )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        return sampling.argmax(logits, workspace=self._sampling)

    def sample(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        return sampling.sample(logits, self._unit[: len(logits)], seeds, positions, workspace=self._sampling)
