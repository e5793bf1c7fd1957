"""EAGLE-3 heads (Li et al., 2025), as they are published: a folder with config.json and safetensors of their own.

    state = fc [what a low, a middle and a high layer of the model have made of the token]
    entry = [input_layernorm(embedding of the next token) ; hidden_norm(state)]
    state = state + attention(entry);  state = state + perceptron(post_attention_layernorm(state))
    guess = d2t(likeliest of lm_head(norm(state)))

The head may know only the `draft_vocab_size` most frequent tokens; entry k of d2t is how far the k-th one's id is from
k. The layer is called `midlayer`, or `layers.0`. Which layers are read: those after the first 2, after half of the
model's, and before its last 3, unless config.json says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.architecture import Architecture, architecture_of
from paged_backend.models.blocks.attention import Attention
from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass, RopeTensors
from paged_backend.models.blocks.residual import allocate_norm, norm_parameters
from paged_backend.models.config_file import CheckedFile, ConfigFile, Size, checked, read_json
from paged_backend.models.decoder import Layer
from paged_backend.models.families import llama
from paged_backend.models.families.family import Family
from paged_backend.models.layer_spec import AdapterSite, Branch
from paged_backend.models.proposal_head import ProposalHead
from paged_backend.models.step import LayerPages
from paged_backend.models.weight_files import check_tensors, find_tensors, read_tensors
from paged_backend.models.weights import Weights
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_RENAMES = {"midlayer.": "layers.0."}
_LAYER, _EMBEDDING, _OFFSETS = "layers.0.", "embed_tokens.weight", "d2t"

_LayerNumbers = Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(min_length=1, max_length=16)]


class _EagleOptions(CheckedFile):
    # layers whose answers are read, from 0
    eagle_aux_hidden_state_layer_ids: _LayerNumbers | None = None


class Eagle3File(ConfigFile):
    """The keys of its own; those with a single value are of forms that are not computed."""

    draft_vocab_size: Size | None = None
    target_hidden_size: Size | None = None
    eagle_aux_hidden_state_layer_ids: _LayerNumbers | None = None  # after so many layers
    eagle_config: _EagleOptions | None = None
    norm_before_residual: bool = False
    norm_before_fc: Literal[False] | None = None
    fc_norm: Literal[False] | None = None
    norm_output: Literal[False] | None = None
    num_hidden_layers: Literal[1] = 1


@dataclass(frozen=True)
class Eagle3:
    """What a head's config.json says, beside its layer."""

    taps: tuple[int, ...]  # it reads what so many of the model's layers have made of a token
    normed_residual: bool  # the state that goes on beside the layer is the normed one
    target_hidden_size: int
    target_vocab_size: int


def is_eagle3(folder: Path) -> bool:
    """Whether a checkpoint is a head, and no model of its own."""
    path = folder / "config.json"
    return path.is_file() and (read_json(path).get("architectures") or ["none"])[0] in _ARCHITECTURES


def read_eagle3(folder: Path, target: Architecture) -> tuple[Architecture, Eagle3]:
    """A head as a model of one layer and of its own vocabulary.

    Raises:
        EngineError: config.json is missing or broken, asks for something that is not supported, or is of a head for
            another model.
    """
    content = read_json(folder / "config.json")
    name = (content.get("architectures") or ["none"])[0]
    if name not in _ARCHITECTURES:
        raise EngineError(
            f"architecture {str(name)[:80]} is no head of EAGLE-3; supported: {', '.join(_ARCHITECTURES)}"
        )
    family = Family(name, "llama", llama.layers, config=Eagle3File)
    architecture = architecture_of(folder, content, family)
    file = checked(Eagle3File, content, "config.json")
    if architecture.vocab_size != target.vocab_size:
        raise EngineError(f"vocab_size {architecture.vocab_size} is not the model's ({target.vocab_size})")
    if (file.target_hidden_size or architecture.hidden_size) != target.hidden_size:
        size = file.target_hidden_size or architecture.hidden_size
        raise EngineError(f"the head is for a model of hidden_size {size}, not {target.hidden_size}")
    if architecture.quantization is not None:
        raise EngineError("quantised heads are not supported")
    layer = replace(architecture.layers[0], attention_branch=Branch(None))
    own_vocabulary = replace(architecture, layers=(layer,), vocab_size=file.draft_vocab_size or target.vocab_size)
    taps = _taps(file, target.num_layers)
    return own_vocabulary, Eagle3(taps, file.norm_before_residual, target.hidden_size, target.vocab_size)


def _taps(file: Eagle3File, num_layers: int) -> tuple[int, ...]:
    """
    Raises:
        EngineError: the model has no such layers.
    """
    taps = [2, num_layers // 2, num_layers - 3]
    if file.eagle_aux_hidden_state_layer_ids is not None:
        taps = file.eagle_aux_hidden_state_layer_ids
    elif file.eagle_config is not None and file.eagle_config.eagle_aux_hidden_state_layer_ids is not None:
        taps = [number + 1 for number in file.eagle_config.eagle_aux_hidden_state_layer_ids]
    if min(taps) < 1 or max(taps) > num_layers or len(set(taps)) < len(taps):
        raise EngineError(f"the head reads what {taps} of the model's layers make, of which there are {num_layers}")
    return tuple(taps)


@dataclass(frozen=True)
class Eagle3Weights:
    """A head; uninitialised until it is loaded."""

    fusion: Linear  # fc: [hidden, taps * the model's hidden]
    token_norm: Norm
    state_norm: Norm
    layer: Layer
    final_norm: Norm
    head: Linear  # [draft vocabulary, hidden]
    embedding: Tensor | None  # [vocab, hidden]; None: the model's
    offsets: Tensor | None  # d2t: int64 [draft vocabulary]; None: all of the model's vocabulary

    @property
    def targets(self) -> dict[str, Tensor]:
        """Name in the checkpoint, as _RENAMES has it -> the tensor that it fills; but for d2t."""
        found = {
            "fc.weight": self.fusion.weight,
            "lm_head.weight": self.head.weight,
            **norm_parameters("norm", self.final_norm),
            **norm_parameters(f"{_LAYER}input_layernorm", self.token_norm),
            **norm_parameters(f"{_LAYER}hidden_norm", self.state_norm),
            **{f"{_LAYER}{name}": tensor for name, tensor in self.layer.parameters().items()},
        }
        return found if self.embedding is None else found | {_EMBEDDING: self.embedding}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.targets.values())

    def check(self, folder: Path) -> None:
        """
        Raises:
            EngineError: a tensor is missing, or of another shape or type.
        """
        stored = find_tensors(folder, _RENAMES)
        check_tensors(stored, self.targets)
        if self.offsets is not None:
            found = stored.get(_OFFSETS)
            if found is None or found.kind != "I64" or found.shape != tuple(self.offsets.shape):
                raise EngineError(f"checkpoint: tensor d2t: expected {len(self.offsets)} numbers of type I64")

    def load(self, folder: Path, vocab_size: int) -> None:
        """
        Raises:
            EngineError: as `check`; numbers are not finite, or d2t leads out of the vocabulary.
        """
        self.check(folder)
        stored, targets = find_tensors(folder, _RENAMES), self.targets
        for name, tensor in read_tensors(stored, targets):
            targets[name].copy_(tensor)
            if not targets[name].isfinite().all():
                raise EngineError(f"checkpoint: tensor {stored[name].name} holds numbers that are not finite")
        if self.offsets is not None:
            ((_, offsets),) = read_tensors(stored, [_OFFSETS])
            self.offsets.copy_(offsets)
            ids = offsets + torch.arange(len(offsets))
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise EngineError(f"checkpoint: tensor d2t leads out of the vocabulary of {vocab_size} tokens")

    def randomise(self, scale: float, seed: int) -> None:
        generator = torch.Generator(self.head.weight.device).manual_seed(seed)
        for name, target in self.targets.items():
            if name.endswith("norm.weight"):
                target.fill_(1)
            else:
                target.normal_(0, scale, generator=generator)
        if self.offsets is not None:
            self.offsets.zero_()


def allocate_eagle3(
    architecture: Architecture, eagle: Eagle3, stored: Collection[str], dtype: torch.dtype, device: torch.device
) -> Eagle3Weights:
    """stored: names that the checkpoint has.

    Raises:
        EngineError: it lacks an embedding, and the model's is of another size.
    """
    a, spec = architecture, architecture.layers[0]
    empty = Allocate(dtype, device)
    own_embedding = _EMBEDDING in stored
    if not own_embedding and a.hidden_size != eagle.target_hidden_size:
        raise EngineError(f"checkpoint: tensor {_EMBEDDING} is missing, and the model's is of another size")
    layer = Layer(spec, a.hidden_size, empty)
    assert isinstance(layer.attention, Attention)
    qkv, _ = layer.attention.spec.sites(a.hidden_size)
    wide = AdapterSite(qkv.modules, 2 * a.hidden_size, qkv.out_sizes)  # of an entry
    layer.attention.qkv = empty.linear(wide, layer.attention.spec.qkv_bias)
    norms = [allocate_norm(norm, a.hidden_size, empty) for norm in (spec.norm, spec.norm, a.ends.norm)]
    return Eagle3Weights(
        Linear(empty(a.hidden_size, len(eagle.taps) * eagle.target_hidden_size)),
        norms[0],
        norms[1],
        layer,
        norms[2],
        Linear(empty(a.vocab_size, a.hidden_size)),
        empty(eagle.target_vocab_size, a.hidden_size) if own_embedding else None,
        empty(a.vocab_size, dtype=torch.int64) if a.vocab_size != eagle.target_vocab_size else None,
    )


class Eagle3Head(ProposalHead):
    """Reads a few layers of the model."""

    def __init__(
        self,
        weights: Eagle3Weights,
        eagle: Eagle3,
        target: Weights,
        ops: Ops,
        ropes: Mapping[str | None, RopeTensors],
    ) -> None:
        super().__init__(ops, ropes)
        self._weights, self._eagle = weights, eagle
        self._embedding = target.embedding if weights.embedding is None else weights.embedding
        self.taps, self.dtype, self.hidden_size = eagle.taps, self._embedding.dtype, self._embedding.shape[1]

    def entering(self, tapped: Tensor) -> Tensor:
        return self._ops.linear(tapped, self._weights.fusion)

    def _layer(self, token_ids: Tensor, states: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        ops, weights = self._ops, self._weights
        tokens = ops.norm(ops.embedding(token_ids, self._embedding), weights.token_norm)
        normed = ops.norm(states, weights.state_norm)
        entries = torch.cat([tokens, normed], dim=1)
        # blocks may write over what they add to
        beside = normed if self._eagle.normed_residual else states.clone()
        return weights.layer.mlp.forward(weights.layer.attention.forward(beside, pages, at, entries), at)

    def guesses(self, states: Tensor) -> Tensor:
        token = self._ops.argmax(self._ops.norm_linear(states, self._weights.final_norm, self._weights.head))
        return token if self._weights.offsets is None else token + self._weights.offsets[token]
