"""What comes back: a `Delta` for every response of a stream, an `Answer` for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Tokens of one request so far."""

    num_input_tokens: int = 0  # of the prompt
    num_cached_tokens: int = 0  # of those, found in the server's prefix cache
    num_output_tokens: int = 0


@dataclass(frozen=True)
class Delta:
    """A piece of answer. The last one of a stream has a finish_reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # "stop" | "length"
    usage: Usage  # up to and including this piece


@dataclass(frozen=True)
class Answer:
    """A whole answer, or what came of it before the stream was left."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # None: it was left before its end
    usage: Usage = Usage()


def delta_of(outputs: Mapping[str, Any], num_output_tokens: int) -> Delta:
    """A response's outputs (name → list of values) as a Delta; `num_output_tokens` came before it."""
    token_ids = tuple(int(token_id) for token_id in outputs.get("output_ids", ()))
    reason = next(iter(outputs.get("finish_reason", ())), "None")
    usage = Usage(_first(outputs, "num_input_tokens"), _first(outputs, "num_cached_tokens"), num_output_tokens + len(token_ids))
    return Delta("".join(outputs.get("text_output", ())), token_ids, None if reason == "None" else reason, usage)


def _first(outputs: Mapping[str, Any], name: str) -> int:
    return int(next(iter(outputs.get(name, ())), 0))
