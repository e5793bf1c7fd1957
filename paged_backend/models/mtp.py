"""The layer of multi-token prediction that a checkpoint brings behind its decoder's last (DeepSeek-V3's report, 2024,
section 2.2; GLM-4.5 has one, and so has MiMo).

    entry = eh_proj [enorm(embedding of the next token) ; hnorm(the model's normed state)]
    state = shared_head.norm(layer(entry))        guess = head(state)

For further guesses its own state stands in the model's place, normed as that is: hnorm was trained on such states, and
on others is right less often (measured in ROCm/ATOM's pull request 1764: 61 % of DeepSeek-R1's guesses, not 65 %).

It lies at model.layers.N, N = num_hidden_layers, as a layer of the decoder with the modules above beside its own. Its
embedding and head are the model's, of which some checkpoints have a second copy there. What other families do
otherwise, their MtpForm says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture
from paged_backend.models.blocks.forward_pass import ForwardPass, RopeTensors
from paged_backend.models.layer_spec import MtpForm
from paged_backend.models.proposal_head import ProposalHead
from paged_backend.models.step import LayerPages
from paged_backend.models.weight_files import check_tensors, find_tensors, read_tensors
from paged_backend.models.weights import Weights, load_weights, randomise_weights
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops

MTP_LAYER = "model.layers.0."  # what the layer is called here


def mtp_architecture(target: Architecture, folder: Path, *, by_name: bool) -> Architecture:
    """The layer as a model of one layer, under the names that `renames` gives it. by_name: there are tensors' files.

    Raises:
        EngineError: the checkpoint brings no such layer, or in a form that is not read.
    """
    form = target.mtp
    if form is None:
        raise EngineError(
            f"speculation: mtp needs a layer of multi-token prediction, and this checkpoint of {target.name} brings "
            "none (num_nextn_predict_layers)"
        )
    if target.quantization is not None and not target.quantization.online:
        raise EngineError(f"speculation: mtp is not supported for quantised checkpoints ({target.quantization.name})")
    prefix = form.place.format(num_layers=target.num_layers)
    renames = {
        f"{prefix}{form.final_norm}.": "model.norm.",
        f"{prefix}shared_head.head.": "lm_head.",
        f"{prefix}embed_tokens.": "model.embed_tokens.",
        prefix: MTP_LAYER,
        "model.layers.": "decoder.layers.",
        "model.norm.": "decoder.norm.",
    }
    stored = find_tensors(folder) if by_name else {}
    if any(name.startswith(f"{prefix}embed_tokens.") for name in stored):
        renames["model.embed_tokens."] = "decoder.embed_tokens."
    own_head = any(name.startswith(f"{prefix}shared_head.head.") for name in stored)
    if own_head:
        renames["lm_head."] = "decoder.lm_head."
    return replace(
        target,
        layers=target.layers[-1:],
        tied_head=target.tied_head and not own_head,
        quantization=None,
        renames=renames,
        unread=(),
    )


@dataclass(frozen=True)
class MtpWeights:
    """A layer of multi-token prediction; uninitialised until it is loaded."""

    form: MtpForm
    decoder: Weights
    token_norm: Norm
    state_norm: Norm
    join: Linear  # [hidden, 2 hidden]

    @property
    def targets(self) -> dict[str, Tensor]:
        """Name in the checkpoint, as `renames` has it -> the tensor that it fills; but for the decoder's."""
        return {
            f"{MTP_LAYER}{self.form.token_norm}.weight": self.token_norm.weight,
            f"{MTP_LAYER}{self.form.state_norm}.weight": self.state_norm.weight,
            f"{MTP_LAYER}{self.form.join}.weight": self.join.weight,
        }

    @property
    def num_bytes(self) -> int:
        return self.decoder.num_bytes + sum(tensor.numel() * tensor.element_size() for tensor in self.targets.values())

    def check(self, folder: Path) -> None:
        """
        Raises:
            EngineError: a tensor beside the decoder's is missing, or of another shape.
        """
        check_tensors(find_tensors(folder, self.decoder.renames), self.targets)

    def load(self, folder: Path) -> None:
        """
        Raises:
            EngineError: a file or a tensor is missing, broken or of another shape.
        """
        load_weights(self.decoder, folder, lambda sentence: None)
        stored, targets = find_tensors(folder, self.decoder.renames), self.targets
        check_tensors(stored, targets)
        for name, tensor in read_tensors(stored, targets):
            targets[name].copy_(tensor)
            if not targets[name].isfinite().all():
                raise EngineError(f"checkpoint: tensor {stored[name].name} holds numbers that are not finite")

    def randomise(self, architecture: Architecture, seed: int) -> None:
        randomise_weights(self.decoder, architecture, seed)
        for norm in (self.token_norm, self.state_norm):
            norm.weight.fill_(1)
        generator = torch.Generator(self.join.weight.device).manual_seed(seed)
        self.join.weight.normal_(0, architecture.initializer_range, generator=generator)

    def sharing(self, target: Weights) -> MtpWeights:
        """With the model's embedding and head in the place of copies of them."""
        decoder = self.decoder
        if _same(decoder.embedding, target.embedding):
            decoder = replace(decoder, embedding=target.embedding)
        return replace(self, decoder=replace(decoder, head=kept_once(decoder.head, target.head)))


def kept_once(own: Linear, other: Linear) -> Linear:
    """`other`, if `own` is a copy of it, scales and all; else `own`."""
    alike = own.format == other.format and len(own.tensors) == len(other.tensors)
    return other if alike and all(map(_same, own.tensors, other.tensors)) else own


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same numbers of the same type; those of 8 bits bit by bit, for which alone every device can
    tell.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.itemsize == 1:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


def allocate_mtp(decoder: Weights, architecture: Architecture) -> MtpWeights:
    """decoder: of the architecture, which is that of `mtp_architecture`."""
    form, hidden_size = architecture.mtp, architecture.hidden_size
    assert form is not None
    eps, empty = decoder.final_norm.eps, decoder.embedding.new_empty
    token_norm, state_norm = (Norm(empty(hidden_size), eps) for _ in range(2))
    return MtpWeights(form, decoder, token_norm, state_norm, Linear(empty(hidden_size, 2 * hidden_size)))


class MtpHead(ProposalHead):
    """Reads what the model's last layer makes, after the final norm or before it, as the form says."""

    def __init__(self, weights: MtpWeights, target: Weights, ops: Ops, ropes: Mapping[str | None, RopeTensors]) -> None:
        super().__init__(ops, ropes)
        self._weights, self._target_norm = weights, target.final_norm
        self.taps = (len(target.layers),)
        self.dtype, self.hidden_size = target.embedding.dtype, target.embedding.shape[1]

    def entering(self, tapped: Tensor) -> Tensor:
        return self._ops.norm(tapped, self._target_norm) if self._weights.form.reads_normed else tapped

    def _layer(self, token_ids: Tensor, states: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        ops, weights = self._ops, self._weights
        tokens = ops.norm(ops.embedding(token_ids, weights.decoder.embedding), weights.token_norm)
        joined = [tokens, ops.norm(states, weights.state_norm)]
        entries = torch.cat(joined[::-1] if weights.form.state_first else joined, dim=1)
        x = weights.decoder.layers[0].forward(ops.linear(entries, weights.join), pages, at)
        return ops.norm(x, weights.decoder.final_norm) if weights.form.reads_normed else x

    def guesses(self, states: Tensor) -> Tensor:
        decoder = self._weights.decoder
        norm = None if self._weights.form.reads_normed else decoder.final_norm
        return self._ops.argmax(self._ops.norm_linear(states, norm, decoder.head))
