"""What blocks are given: memory while they are made, and the step at hand while they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from paged_backend.models.blocks.products import Products
from paged_backend.models.step import StepTensors
from paged_kernels.reference import Ops

Allocate = Callable[..., Tensor]  # sizes -> an uninitialised tensor of the weights' type on their device


@dataclass(frozen=True)
class ForwardPass:
    """One step on its way through the blocks."""

    ops: Ops
    products: Products
    step: StepTensors
    rope_table: Tensor  # [max_len, head_dim] float32: models/rope.py
