"""The demo model's files, in transformers' layout, and its draft head's, in that of published EAGLE-3 heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from tools.demo_model.draft_head import DraftHead, HeadShape
from tools.demo_model.model import EPS, THETA, DemoModel, Shape
from tools.demo_model.vocabulary import BOS_ID, EOS_ID, LATER_TOKENS, for_transformers, with_later_tokens


def hugging_face_config(shape: Shape) -> PreTrainedConfig:
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_model_len,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if not shape.num_experts:
        return LlamaConfig(**common, architectures=["LlamaForCausalLM"])
    return Qwen3MoeConfig(
        **common,
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.intermediate_size,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _places(model: DemoModel) -> dict[str, Tensor]:
    """The weights by the names that transformers gives them, as views; the head is the embedding."""
    names = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    perceptron = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    experts = model.shape.num_experts
    if experts:
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "router": "mlp.gate"}
    else:
        names |= {ours: f"mlp.{theirs}" for ours, theirs in perceptron.items()}
    found = {"model.embed_tokens.weight": model.embedding.detach(), "model.norm.weight": model.final_norm.detach()}
    for ours, theirs in names.items():
        stacked = getattr(model, ours).detach()
        found |= {f"model.layers.{layer}.{theirs}.weight": weight for layer, weight in enumerate(stacked)}
    for ours, theirs in perceptron.items() if experts else ():
        for number, weight in enumerate(getattr(model, ours).detach()):
            layer, expert = divmod(number, experts)
            found[f"model.layers.{layer}.mlp.experts.{expert}.{theirs}.weight"] = weight
    return found


def hugging_face_weights(model: DemoModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """As a checkpoint has them."""
    return {name: weight.to("cpu", dtype).contiguous() for name, weight in _places(model).items()}


def save(model: DemoModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes configuration, weights, tokenizer and chat template: all that a server needs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(model.shape)
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(folder)
    _save_weights(hugging_face_weights(model, dtype), folder)
    for_transformers(tokenizer, model.shape.max_model_len).save_pretrained(folder)


def _save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    part = folder / "model.safetensors.part"  # a run that is cut off leaves the last whole file
    save_file(weights, part, metadata={"format": "pt"})
    part.rename(folder / "model.safetensors")


def head_config(head: HeadShape, shape: Shape) -> dict[str, Any]:
    """As published heads say it. Layers are counted from 0, by the last that was computed."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": head.hidden_size,
        "intermediate_size": head.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": head.num_heads,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "max_position_embeddings": shape.max_model_len,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": head.vocab_size,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [after - 1 for after in head.taps]},
        "torch_dtype": "bfloat16",
    }


def save_head(head: DraftHead, shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes configuration and weights of a head for a model of this shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(head_config(head.shape, shape), indent=2) + "\n")
    weights = {
        "fc": head.fusion[0],
        "midlayer.input_layernorm": head.token_norm,
        "midlayer.hidden_norm": head.state_norm,
        "midlayer.self_attn.q_proj": head.q[0],
        "midlayer.self_attn.k_proj": head.k[0],
        "midlayer.self_attn.v_proj": head.v[0],
        "midlayer.self_attn.o_proj": head.o[0],
        "midlayer.post_attention_layernorm": head.mlp_norm,
        "midlayer.mlp.gate_proj": head.gate[0],
        "midlayer.mlp.up_proj": head.up[0],
        "midlayer.mlp.down_proj": head.down[0],
        "norm": head.final_norm,
        "lm_head": head.head,
    }
    found = {f"{name}.weight": weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    known = head.token_ids.cpu()
    found["d2t"] = known - torch.arange(len(known))
    found["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, known, True)
    _save_weights(found, folder)


def load(model: DemoModel, folder: Path) -> Tokenizer:
    """Puts a folder's weights into the model. The tokenizer, with the tokens that came later; where the folder's has
    them not, their embeddings begin as noise.
    """
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, place in _places(model).items():
            place.copy_(weights.pop(name))
    assert not weights, sorted(weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    later = with_later_tokens(tokenizer)
    if tokenizer.token_to_id(LATER_TOKENS[0]) is None:
        _begin(model, [later.token_to_id(token) for token in LATER_TOKENS])
    return later


@torch.no_grad()
def _begin(model: DemoModel, token_ids: list[int]) -> None:
    """Embeddings that have meant nothing: as long as others, in no direction."""
    table = model.embedding
    noise = torch.randn(len(token_ids), table.shape[1], generator=torch.Generator().manual_seed(0))
    table[token_ids] = (noise / noise.norm(dim=1, keepdim=True)).to(table) * table.norm(dim=1).mean()
