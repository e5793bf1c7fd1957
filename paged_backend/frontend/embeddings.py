"""Embeddings in a front end: what may be asked of one, and how it goes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from paged_backend.errors import RequestError
from paged_backend.frontend.delta import Delta, Embedding
from paged_backend.messages import PromptEmbedding, Ready
from paged_backend.request import Request, SamplingParams, parse_sampling

KEYS = ("pooling", "dimensions", "normalize")  # mean something to an embedding alone
_OPTIONS = (
    *KEYS,
    "truncate_prompt_tokens",
    "add_special_tokens",
    "priority_level",
    "request_deadline_seconds",
    "skip_prefix_cache",
    "lora_name",
)


def check_no_embedding_keys(options: Mapping[str, Any]) -> None:
    """
    Raises:
        RequestError: a key is given that says how an embedding is made, where none is.
    """
    for name in KEYS:
        if options.get(name) is not None:
            raise RequestError(f"{name}: only with task embed")


def embedding_sampling(options: Mapping[str, Any]) -> SamplingParams:
    """The engine's side of a request with these options: one token, which nobody is shown.

    Raises:
        RequestError: a key is given that says how text is made, or a value is not allowed.
    """
    for name, value in options.items():
        if name not in _OPTIONS and value is not None:
            raise RequestError(f"{name[:80]}: not with task embed, which takes {', '.join(_OPTIONS)}")
    own = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return parse_sampling({**options, **own})


def settled(sampling: SamplingParams, ready: Ready) -> SamplingParams:
    """With what the request leaves open.

    Raises:
        RequestError: more dimensions are asked for than there are.
    """
    if sampling.dimensions is not None and sampling.dimensions > ready.embedding_size:
        raise RequestError(
            f"dimensions: {sampling.dimensions} is more than this model's embeddings have ({ready.embedding_size})"
        )
    return sampling if sampling.pooling is not None else msgspec.structs.replace(sampling, pooling=ready.pooling)


def vllm_request(members: Mapping[str, Any]) -> tuple[str | list[int], dict[str, Any]]:
    """(prompt, options) of the input `embedding_request` of NVIDIA's vLLM backend: {"input": TEXT or TOKEN IDS,
    "pooling_params": {"dimensions": [N]}}.

    Raises:
        RequestError: names the member that is wrong.
    """
    prompt, pooling = members.get("input"), members.get("pooling_params") or {}
    is_ids = (
        isinstance(prompt, list)
        and bool(prompt)
        and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in prompt)
    )
    if not isinstance(prompt, (str, list)) or not (is_ids or isinstance(prompt, str)):
        raise RequestError("embedding_request: input: expected a text or a list of token ids")
    if not isinstance(pooling, dict):
        raise RequestError("embedding_request: pooling_params: expected a JSON object")
    dimensions = pooling.get("dimensions")
    if isinstance(dimensions, list) and len(dimensions) == 1:
        dimensions = dimensions[0]
    return prompt, {} if dimensions is None else {"dimensions": dimensions}


def embedding_delta(delta: Delta, report: PromptEmbedding, request: Request) -> Delta:
    """The whole answer. delta: of the token that nobody is shown."""
    sampling = request.sampling
    values = np.frombuffer(report.values, np.float32)[: sampling.dimensions].copy()
    if sampling.normalize:
        values /= max(float(np.linalg.norm(values)), 1e-12)
    text = json.dumps(values.tolist()) if request.embedding_as_text else ""
    return Delta(
        text=text,
        prompt=Embedding(values),
        num_input_tokens=delta.num_input_tokens,
        num_cached_tokens=delta.num_cached_tokens,
        finish_reason="stop",
    )
