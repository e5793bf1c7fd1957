"""Requests that need no engine: the token ids of a text, the text of token ids, and what a gateway must know of the
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from paged_backend.config import DEMO_MODEL, EngineConfig
from paged_backend.errors import RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.prompt import PromptReader
from paged_backend.request import Request


def answer_task(request: Request, prompts: PromptReader, config: EngineConfig) -> Delta:
    """The whole answer to a request whose task is not to generate.

    Raises:
        RequestError: what the caller must change.
    """
    if request.task == "describe":
        text = msgspec.json.encode(describe(prompts, config)).decode()
        return Delta(text=text, finish_reason="stop", last=True)
    ids: list[int] = prompts.token_ids(request).tolist()
    if request.task == "detokenize":
        if prompts.tokenizer is None:
            raise RequestError("task: this model has no tokenizer")
        text = prompts.tokenizer.decode(ids, skip_special_tokens=False)
        return Delta(text=text, finish_reason="stop", last=True)
    return Delta(token_ids=tuple(ids), num_input_tokens=len(ids), finish_reason="stop", last=True)


def describe(prompts: PromptReader, config: EngineConfig) -> dict[str, Any]:
    """What does not change while the model is loaded, but for the adapters, which are looked for now."""
    template = prompts.chat_template
    return {
        "max_model_len": prompts.ready.max_model_len,
        "vocab_size": prompts.ready.vocab_size,
        "special_words": list(prompts.special_ids),
        "chat_templates": {} if template is None else template.exported.templates,
        "response_template": None if template is None else template.exported.response_template,
        "adapters": _adapters(config.lora_directory),
        "model": None if config.model_folder() is not None and config.model != DEMO_MODEL else config.model,  # no paths
        "page_size": prompts.ready.page_size,
        # of tokens, for routers: with several KV groups the pool has that many for each
        "num_pages": prompts.ready.max_pool_tokens // prompts.ready.page_size,
        "max_batched_tokens": config.max_batched_tokens,
        "kv_events": config.kv_events,
        "embeddings": {"pooling": prompts.ready.pooling, "dimensions": prompts.ready.embedding_size},
        "makes_text": prompts.ready.makes_text,
    }


def _adapters(folder: str) -> list[str]:
    """Names of the folders that may be adapters; whether they can be served is known once somebody asks for one."""
    if not folder:
        return []
    try:
        return sorted(file.parent.name for file in Path(folder).glob("*/adapter_config.json"))
    except OSError as error:
        raise RequestError(f"task: the adapters' folder cannot be read: {error.strerror}") from None
