"""Names that a request brings and this model does not know: one that looks like a mistake is refused, the others are
left out with a warning.

Triton Server adds names to a request (`id`, and the headers that --grpc-header-forward-pattern lets through), and
clients of vLLM send all of its keys. A caller who meant another name must hear of it all the same: `max_token` is not
ignored.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from paged_backend.errors import RequestError

_NEAR = 0.8  # of difflib's ratio: max_new_tokens is max_tokens, x-request-id is nothing
_LONGEST_NAME = 64
_MOST_WARNINGS = 64  # of one process: callers choose the names
_VLLM_UNUSED = frozenset(
    [
        *(
            "extra_args",
            "flat_logprobs",
            "kv_transfer_params",
            "mm_processor_kwargs",
            "output_kind",
            "output_text_buffer_length",
            "repetition_detection",
        ),
        *(
            "request_id",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "skip_clone",
            "skip_reading_prefix_cache",
            "spaces_between_special_tokens",
        ),
        "thinking_token_budget",
    ]
)

log = logging.getLogger("paged")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` looks like."""
    written = name[:_LONGEST_NAME].replace("-", "_").casefold()
    return None if written.startswith("x_") else next(iter(difflib.get_close_matches(written, known, 1, _NEAR)), None)


def without_unknown(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The request's parameters whose names are known.

    Raises:
        RequestError: another one looks like one of them.
    """
    for name in given:
        if name not in known:
            meant = nearest(name, known)
            if meant is not None:
                raise RequestError(f"unknown request parameter '{name[:_LONGEST_NAME]}': did you mean '{meant}'?")
            _warn("request parameter", name)
    return {name: value for name, value in given.items() if name in known}


def without_foreign(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling keys without null ones and vLLM's own that change nothing here; its `priority` is priority_level.

    Raises:
        RequestError: one of vLLM's would change the answer.
    """
    taken = {name: value for name, value in options.items() if value is not None}
    for name in [name for name in taken if name in _VLLM_UNUSED or name.startswith("_")]:
        del taken[name]
        _warn("sampling parameter", name)
    if taken.pop("logits_processors", None):
        raise RequestError("logits_processors: not supported: a request brings no code")
    if "priority" in taken:
        priority = taken.pop("priority")
        if taken.setdefault("priority_level", priority) != priority:
            raise RequestError("priority: not together with another priority_level")
    return taken


def _warn(kind: str, name: str) -> None:
    if _warned.cache_info().currsize < _MOST_WARNINGS:
        _warned(kind, name[:_LONGEST_NAME])


@cache
def _warned(kind: str, name: str) -> None:
    """Says it once."""
    log.warning("%s %r means nothing to this model and is ignored", kind, name)
