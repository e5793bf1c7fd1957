"""The block of experts by itself: how its answer joins the residual stream."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.moe import MoeMlp
from paged_backend.models.layer_spec import AttentionSpec, Branch, LayerSpec, MoeSpec
from paged_kernels.codes import dequantise
from paged_kernels.experts import MXFP4, Gate, Routing
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference
from tests.expert_cases import expert_layer, quantised, written_out

HIDDEN = 16
BRANCHES = {
    "as it is": Branch("input_norm"),
    "without a norm": Branch(None),
    "normed behind": Branch("input_norm", after="output_norm"),
    "a multiple": Branch("input_norm", multiplier=0.25),
    "normed behind, a multiple": Branch(None, after="output_norm", multiplier=3.0),
}


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return x if norm is None else reference.norm(x, norm)


@pytest.mark.parametrize("shared_size", [0, 24], ids=["experts alone", "and a shared one"])
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_the_answer_joins_the_stream_as_the_branch_says(branch: Branch, shared_size: int) -> None:
    spec = MoeSpec(6, 8, Routing(2, "softmax", renormalised=True), shared_size=shared_size, shared_gate=shared_size > 0)
    layer = LayerSpec(AttentionSpec(2, 1, 8), spec, mlp_branch=branch)
    block = MoeMlp(layer, spec, HIDDEN, Allocate(torch.float32, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    for tensor in block.parameters().values():
        tensor.normal_(0, 0.5, generator=generator)
    x = torch.randn(5, HIDDEN, generator=generator)

    read = normed(x, block.residual.before)
    answer = written_out(read, *reference.route(read, block.experts), block.experts).float()
    if block.shared_gate_up is not None and block.shared_down is not None and block.shared_scale is not None:
        gate, up = (read @ block.shared_gate_up.weight.T).chunk(2, 1)
        shared = torch.nn.functional.silu(gate) * up * torch.sigmoid(read @ block.shared_scale.weight.T)
        answer += shared @ block.shared_down.weight.T
    expected = x + branch.multiplier * normed(answer, block.residual.after)

    at = ForwardPass(reference, reference, cast(Any, None), {})
    torch.testing.assert_close(block.forward(x.clone(), at), expected, rtol=1e-5, atol=1e-5)


def test_only_the_chosen_experts_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU serves gpt-oss: what nobody chose is not touched, and an expert that many chose is unpacked once."""
    plain = expert_layer(6, 64, 32, Routing(2, "softmax"), Gate(), bias=False)
    experts, unpacked = quantised(plain, MXFP4), list[int]()

    def counted(linear: Linear) -> torch.Tensor:
        unpacked.append(linear.num_rows)
        return dequantise(linear)

    monkeypatch.setattr("paged_kernels.reference_experts.dequantise", counted)
    x, expert_ids = torch.randn(9, 64), torch.tensor([[4, 1]] * 8 + [[1, 3]], dtype=torch.int32)
    found = reference.add_experts(x, expert_ids, torch.full((9, 2), 0.5), experts, torch.zeros_like(x))
    assert unpacked == [64, 64] * 3
    assert not torch.equal(found[0], found[8])
