"""A proposer's drafts as CUDA graphs: all passes of a step's drafts are one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_backend.batch import MOST_DRAFTING
from paged_backend.runner.cuda_graphs import Capture, Graph
from paged_backend.runner.proposer import Proposer
from paged_backend.runner.step_tensors import DeviceRows


def proposal_sizes(num_rows: int) -> list[int]:
    """Rows that a graph drafts for, where so many may run at once; what is left is padding. Kernels' scratch memory is
    of steps of that many.
    """
    most = min(num_rows, MOST_DRAFTING)
    return [size for size in (1, 2, 4, 8) if size < most] + [most]


class ProposalGraphs:
    """Captured `propose` of a proposer, for up to MOST_DRAFTING rows."""

    def __init__(self, proposer: Proposer, rows: DeviceRows, capture: Capture) -> None:
        assert rows.lengths is not None
        self._proposer, self._token_ids, self._lengths, self._capture = proposer, rows.token_ids, rows.lengths, capture
        self._rows = torch.full((MOST_DRAFTING,), -1, dtype=torch.int32, device=rows.token_ids.device)
        self._counts = torch.zeros_like(self._rows)
        self._sizes = proposal_sizes(rows.num_rows)
        self._graphs: dict[int, Graph] = {}

    def capture(self) -> None:
        """Captures every size, the largest first: the others fit into its memory. Each runs once before, on padding,
        which compiles kernels.
        """
        self._rows.fill_(-1)
        for size in reversed(self._sizes):
            self._work(size)
        for size in reversed(self._sizes):
            self._graphs[size], _ = self._capture(lambda size=size: self._work(size))  # type: ignore[misc]

    def propose(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        """As Proposer.propose, of the rows' own token_ids and lengths."""
        count = len(rows)
        size = next(size for size in self._sizes if size >= count)
        self._rows[:count].copy_(rows)
        self._rows[count:size].fill_(-1)
        self._counts[:count].copy_(counts)
        self._graphs[size].replay()

    def _work(self, size: int) -> None:
        self._proposer.propose(self._token_ids, self._lengths, self._rows[:size], self._counts[:size])
