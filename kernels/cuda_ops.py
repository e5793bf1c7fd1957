"""The ops of `reference.py` by kernels, for one model on one CUDA device: what the decoder and the sampler call there.

Scratch memory is allocated once, here; a launch reads nothing back to the host, so a whole decode step can be captured
as a CUDA graph. products.py chooses who multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_kernels import activation as activations
from paged_kernels import logit_edits, lora, ngram, page_copy, rope_kv, row_update, sampling, top_logprobs
from paged_kernels import lone_attention as lone
from paged_kernels import norm as norms
from paged_kernels.cuda_latents import CudaLatents
from paged_kernels.decode_attention import (
    make_decode_plan,
    make_decode_workspace,
    paged_decode_attention,
    plan_decode_attention,
)
from paged_kernels.device_traits import traits_of
from paged_kernels.expert_kernels import ExpertKernels
from paged_kernels.experts import Experts
from paged_kernels.latent_decode import make_latent_workspace
from paged_kernels.linear import Linear
from paged_kernels.lone_token import HeadRules, LoneToken
from paged_kernels.norm_value import Norm
from paged_kernels.prefill_attention import paged_prefill_attention
from paged_kernels.products import Products
from paged_kernels.ranks import ranks
from paged_kernels.truncation import truncation_thresholds

# from here on they are usually short: twice the programs, since ends of sequences interrupt them more than merging
# costs
_MANY_SEQUENCES = 128
# Up to so many decodes with drafts are each attended to for itself: together they would leave much to do to few
# programs. On an H200 a token and four drafts of a sequence of 8,192 take 38 us so and 65 together, those of eight
# sequences of 4,096 159 and 56.
_APART = 16


class CudaOps(CudaLatents):
    """Keeps scratch memory and the plan of the step at hand; steps run one after another on one stream.

    Launches overlap (programmatic dependent launch): a kernel may begin before those before it are complete, and
    fetches weights, the plan of attention, page tables, positions, slots and what earlier steps stored at once. That is
    safe because `embedding`, torch's, stands between the kernels that write those and the layers, and waits for
    everything before it; what one layer's kernel leaves for the next is read after waiting.
    """

    write_spans = staticmethod(row_update.write_spans)
    update_page_tables = staticmethod(row_update.update_page_tables)
    gather_step = staticmethod(row_update.gather_step)
    write_tokens = staticmethod(row_update.write_tokens)
    accept_tokens = staticmethod(row_update.accept_tokens)
    propose_ngram = staticmethod(ngram.propose_ngram)
    propose_repeated = staticmethod(ngram.propose_repeated)
    num_tiles = staticmethod(lora.num_tiles)
    num_splits = staticmethod(lora.num_splits)
    add_bias = staticmethod(logit_edits.add_bias)
    apply_token_mask = staticmethod(logit_edits.apply_token_mask)
    ranks = staticmethod(ranks)

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_windows: Sequence[int | None],
        vocab_size: int,
        max_sequences: int,
        max_outputs: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        latents: tuple[int, torch.dtype] | None = None,
        queries: int = 1,
    ) -> None:
        """sliding_windows: of the layers; each distinct one is planned once a step. max_sequences that decode in a
        step, max_outputs that are sampled. latents: their rank and the type of queries, where layers keep those;
        head_dim is then a latent's width. queries: decodes of a sequence that attention takes at once where some are
        drafts, at most.
        """
        self._pdl = traits_of(device).launches_dependents
        if latents is not None:
            few = many = make_latent_workspace(num_heads, *latents, device)
        else:
            of_heads = num_heads, num_kv_heads, head_dim, kv_dtype, device
            few = make_decode_workspace(*of_heads)
            many = make_decode_workspace(*of_heads, programs_per_multiprocessor=2)
        runs = few if queries == 1 else make_decode_workspace(*of_heads, queries=queries)
        windows = dict.fromkeys(sliding_windows)
        self._plans_of_few, self._plans_of_many, self._plans_of_runs = (
            {window: make_decode_plan(workspace, max_sequences, window or 0) for window in windows}
            for workspace in (few, many, runs)
        )
        self._packs_runs = queries > 1
        self._plans = self._plans_of_few
        self._products = Products(device)
        self._experts = ExpertKernels(device)
        self._sampling = sampling.make_sampling_workspace(max_outputs, vocab_size, device)
        self._prefill: tuple[Tensor, Tensor, int] | None = None
        self._counts: Tensor | None = None  # of apply_penalties
        self._shape = max_outputs, vocab_size
        self._layers: page_copy.PageLayers | None = None

    # ---- products, and what hangs on them

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear, out: Tensor | None = None) -> Tensor:
        return self._products(x, linear, norm_before=norm, out=out)

    def norm_gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str = "silu") -> Tensor:
        return self._products(x, linear, norm_before=norm, gated=True, activation=activation)

    def norm_active_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str) -> Tensor:
        return self.activate(self._products(x, linear, norm_before=norm), activation)

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        return self._products(x, linear, residual=residual)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        return self._products(x, linear)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return norms.norm(x, norm, launch_pdl=self._pdl)

    def add_scaled(self, residual: Tensor, x: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
        return norms.add_scaled(residual, x, norm, multiplier, launch_pdl=self._pdl)

    def gate(self, gate_up: Tensor, activation: str = "silu") -> Tensor:
        return activations.gate(gate_up, activation, launch_pdl=self._pdl)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        return activations.activate(x, activation, out=x, launch_pdl=self._pdl)

    def scale_logits(self, logits: Tensor, multiplier: float, soft_cap: float | None) -> Tensor:
        return activations.scale_logits(logits, multiplier, soft_cap, launch_pdl=self._pdl)

    # ---- experts

    def route(self, x: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        return self._experts.route(x, experts)

    def add_experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts, residual: Tensor) -> Tensor:
        return self._experts.add(x, expert_ids, weights, experts, residual)

    def norm_add_experts(self, x: Tensor, norm: Norm | None, experts: Experts) -> Tensor:
        return self._experts.norm_add(x, norm, experts)

    # ---- adapters

    def assign_adapters(self, rows: Tensor, query_starts: Tensor, row_adapters: Tensor, token_adapters: Tensor) -> None:
        lora.assign_adapters(rows, query_starts, row_adapters, token_adapters, launch_pdl=self._pdl)

    def group_tokens(self, token_adapters: Tensor, num_adapters: int, order: Tensor, tiles: Tensor) -> None:
        lora.group_tokens(token_adapters, num_adapters, order, tiles, launch_pdl=self._pdl)

    def adapter_shrink(
        self,
        x: Tensor,
        weights: Tensor,
        ranks: Tensor,
        order: Tensor,
        tiles: Tensor,
        offset: int,
        num_parts: int,
        hidden: Tensor,
    ) -> None:
        lora.adapter_shrink(x, weights, ranks, order, tiles, offset, num_parts, hidden, launch_pdl=self._pdl)

    def adapter_expand(
        self,
        hidden: Tensor,
        weights: Tensor,
        ranks: Tensor,
        order: Tensor,
        tiles: Tensor,
        offset: int,
        out_sizes: Sequence[int],
        out: Tensor,
    ) -> None:
        lora.adapter_expand(hidden, weights, ranks, order, tiles, offset, out_sizes, out, launch_pdl=self._pdl)

    # ---- attention

    def rope_write_kv(
        self,
        qkv: Tensor,
        num_heads: int,
        qk_norm: tuple[Norm, Norm] | None,
        rope_table: Tensor | None,
        positions: Tensor,
        kv_pages: Tensor,
        slot_mapping: Tensor,
        interleaved: bool = False,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """A norm of all heads together is a launch of its own, in place."""
        head_dim = kv_pages.shape[4]
        if qk_norm is not None and len(qk_norm[0].weight) != head_dim:
            q_size, k_size = (len(norm.weight) for norm in qk_norm)
            for x, norm in zip((qkv[:, :q_size], qkv[:, q_size : q_size + k_size]), qk_norm, strict=True):
                norms.norm(x, norm, out=x, launch_pdl=self._pdl)
            qk_norm = None
        return rope_kv.rope_write_kv(
            qkv,
            num_heads,
            qk_norm,
            rope_table,
            positions,
            kv_pages,
            slot_mapping,
            interleaved=interleaved,
            query_factors=query_factors,
            launch_pdl=self._pdl,
            slots_settled=True,
        )

    def plan_attention(
        self,
        seq_lens: Tensor,
        query_starts: Tensor,
        num_decodes: int,
        max_query_len: int,
        drafting_rows: Tensor | None = None,
    ) -> None:
        """Divides a step's decoding sequences among the multiprocessors and notes where the others' queries are.
        seq_lens 0: padding.
        """
        # as many programs for one: 4 % of a step of Qwen3-0.6B less than with half as many, 12 % over 8,000 tokens
        # (H200, `lone_attention`)
        is_one_or_many = num_decodes == 1 or num_decodes >= _MANY_SEQUENCES
        self._plans = self._plans_of_many if is_one_or_many else self._plans_of_few
        rows = drafting_rows if self._packs_runs and num_decodes > _APART else None
        if rows is not None:
            self._plans = self._plans_of_runs
        if num_decodes:
            for plan in self._plans.values():
                plan_decode_attention(seq_lens[:num_decodes], plan, rows)
        self._prefill = (
            (query_starts[num_decodes:] - num_decodes, seq_lens[num_decodes:], max_query_len) if max_query_len else None
        )

    def decode_attention(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """reference.decode_attention for the lengths that were planned; rows of length 0 stay undefined."""
        out = torch.empty_like(q)
        plan = self._plans[sliding_window]
        paged_decode_attention(
            q,
            kv_pages,
            page_table,
            out,
            plan,
            scale=scale,
            soft_cap=soft_cap or 0.0,
            sinks=sinks,
            launch_pdl=self._pdl,
            plan_settled=self._pdl,
        )
        return out

    def lone_attention(
        self,
        qkv: Tensor,
        heads: HeadRules,
        kv_pages: Tensor,
        at: LoneToken,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One launch, or where it does not reach the reference's two. A row of length 0 stays undefined."""
        if not lone.computes(qkv, heads, kv_pages):
            return super().lone_attention(qkv, heads, kv_pages, at, scale, sliding_window, soft_cap, sinks)
        return lone.lone_attention(
            qkv,
            heads,
            kv_pages,
            at,
            self._plans[sliding_window].workspace,
            scale=scale,
            sliding_window=sliding_window or 0,
            soft_cap=soft_cap or 0.0,
            sinks=sinks,
            launch_pdl=self._pdl,
            store_settled=self._pdl,
        )

    def prefill_attention(
        self,
        q: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        lens: Sequence[tuple[int, int]],
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """reference.prefill_attention for the queries that were planned."""
        assert self._prefill is not None, "plan_attention was told of no prefill"
        query_starts, seq_lens, max_query_len = self._prefill
        out = torch.empty_like(q)
        options = {"sliding_window": sliding_window or 0, "soft_cap": soft_cap or 0.0, "sinks": sinks}
        paged_prefill_attention(
            q, kv_pages, page_table, query_starts, seq_lens, out, max_query_len=max_query_len, scale=scale, **options
        )
        return out

    # ---- pages

    def copy_pages(self, kv_pages: Sequence[Tensor], copies: Tensor) -> None:
        """kv_pages: always the same."""
        if self._layers is None:
            self._layers = page_copy.make_page_layers(kv_pages)
        page_copy.copy_pages(self._layers, copies)

    # ---- sampling

    def ban_bad_words(self, logits: Tensor, words: Tensor, recent: Tensor) -> Tensor:
        num_tokens = torch.full((len(logits),), recent.shape[1], dtype=torch.int32, device=logits.device)
        return logit_edits.ban_bad_words(logits, words.contiguous(), recent, num_tokens)

    def apply_penalties(
        self,
        logits: Tensor,
        history: Tensor,
        prompt_lens: Tensor,
        num_tokens: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=logits.device)
        return logit_edits.apply_penalties(
            logits, history, prompt_lens, num_tokens, repetition, presence, frequency, counts=self._counts
        )

    def argmax(self, logits: Tensor) -> Tensor:
        return sampling.argmax(logits, workspace=self._sampling, out=logits.new_empty(len(logits), dtype=torch.int32))

    def choose(
        self,
        logits: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        rows: Tensor,
        truncation: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """reference.choose, and rows of -1 are padding: token 0 is chosen for them."""
        thresholds = None
        if truncation is not None:
            thresholds = truncation_thresholds(
                logits, *truncation, workspace=self._sampling, temperature=temperature, rows=rows
            )
        out = logits.new_empty(len(logits), dtype=torch.int32)
        return sampling.sample(
            logits, temperature, seeds, positions, workspace=self._sampling, thresholds=thresholds, rows=rows, out=out
        )

    def logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        return sampling.logprobs(logits, token_ids, workspace=self._sampling)

    def top_logprobs(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return top_logprobs.top_logprobs(logits, n, workspace=self._sampling)
