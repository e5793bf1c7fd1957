"""Tensors and workspaces of the sampling kernels' tests: a small vocabulary in several chunks, and a real one."""

from __future__ import annotations

import pytest
import torch

from paged_kernels.sampling import (
    SamplingWorkspace,
    make_sampling_workspace,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


VOCAB, CHUNK = 200, 64


LARGE_VOCAB = 128256


gpu = pytest.mark.gpu


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def small(max_rows: int = 8, vocab_size: int = VOCAB, chunk: int = CHUNK) -> SamplingWorkspace:
    return make_sampling_workspace(max_rows, vocab_size, DEVICE, chunk=chunk)


def large(max_rows: int = 256) -> SamplingWorkspace:
    return make_sampling_workspace(max_rows, LARGE_VOCAB, DEVICE)
