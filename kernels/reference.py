"""Every op of the engine in plain torch: the specification of the kernels beside it, and what runs where there is no
GPU.

Shapes: T tokens of a step, S sequences, P pages in a page-table row, M sampled rows, V vocabulary, D head dimension.
One layer's KV store is `kv_pages` [num_pages, 2, num_kv_heads, page_size, D]; 0 is K, 1 is V. Index tensors are int32
or int64. It may be of another type than the rest. Attention and softmax are computed in float32 whatever the type of
the inputs.

The methods of `Ops` say what each op takes and returns. CudaOps (cuda_ops.py) overrides those that have kernels, which
may write over an argument where its docstring here says so.
"""

from __future__ import annotations

from paged_kernels.reference_adapters import AdapterOps
from paged_kernels.reference_experts import ExpertOps
from paged_kernels.reference_latents import LatentOps
from paged_kernels.reference_logits import SAMPLING_BYTES
from paged_kernels.reference_rows import RowOps

__all__ = ["SAMPLING_BYTES", "Ops", "reference"]


class Ops(ExpertOps, LatentOps, AdapterOps, RowOps):
    """All ops that the runner calls. Keeps no state."""


reference = Ops()
