"""The one place that chooses kernels for a layer of experts, from the number of tokens.

One token: a launch for norm and routing, two for the experts. Many: norm, routing, grouping (one or two launches), two
grouped products, and the sum of each token's answers. Of experts in words (MXFP4) one token takes two products and the
sum as well; on 8-bit tensor cores activations are split before both products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_kernels import expert_products, expert_routing, expert_vectors, expert_words
from paged_kernels import norm as norms
from paged_kernels.device_traits import traits_of
from paged_kernels.experts import Experts
from paged_kernels.norm_value import Norm

_PROGRAMS_PER_MULTIPROCESSOR = 2  # what shared memory has room for
_INTERPRETED = 2  # multiprocessors, as it were


class ExpertKernels:
    """Keeps the counters of its kernels; layers run one after another on one stream."""

    def __init__(self, device: torch.device) -> None:
        traits = traits_of(device)
        self._pdl = traits.launches_dependents
        self._arrivals = expert_routing.make_arrivals(device)
        self._num_multiprocessors = traits.num_multiprocessors if traits.compiles else _INTERPRETED
        self._has_fp8 = traits.has_fp8
        self._num_programs = self._num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR

    def route(self, x: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
        """reference.route."""
        return expert_routing.route(x, experts, arrivals=self._arrivals, launch_pdl=self._pdl)

    def add(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, experts: Experts, residual: Tensor,
        halves: expert_words.Values | None = None,
    ) -> Tensor:  # fmt: skip
        """reference.add_experts; residual is written over. halves: `expert_words.split_rows` of x, if that is known."""
        if experts.has_words:
            return expert_words.add_experts_in_words(
                x, expert_ids, weights, experts, residual, num_multiprocessors=self._num_multiprocessors,
                by_fp8=self._has_fp8, launch_pdl=self._pdl, halves=halves,
            )  # fmt: skip
        if len(x) == 1:
            return expert_vectors.add_experts_of_one(x, expert_ids, weights, experts, residual, launch_pdl=self._pdl)
        return expert_products.add_experts(
            x, expert_ids, weights, experts, residual, num_programs=self._num_programs, launch_pdl=self._pdl
        )

    def norm_add(self, x: Tensor, norm: Norm | None, experts: Experts) -> Tensor:
        """reference.norm_add_experts; x is written over."""
        halves = None
        if len(x) == 1 and norm is not None and norm.is_plain:
            if experts.has_words and self._has_fp8 and x.dtype == torch.bfloat16:
                halves = expert_words.empty_values(1, x.shape[1], x.device)
            normed, *chosen = expert_routing.norm_route_one(
                x, norm.weight, norm.eps, experts, arrivals=self._arrivals, halves=halves, launch_pdl=self._pdl
            )
        else:
            normed = x if norm is None else norms.norm(x, norm, launch_pdl=self._pdl)
            chosen = list(self.route(normed, experts))
        return self.add(normed, *chosen, experts, x, halves)
