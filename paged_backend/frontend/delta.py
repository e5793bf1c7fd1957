"""A piece of an answer on its way to the caller."""

from __future__ import annotations

import msgspec

from paged_backend.errors import RequestError
from paged_backend.frontend.prompt_logprobs import PromptTable
from paged_backend.messages import TokenScores


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of answer, ready to send: of one of the request's sequences. A sequence's last has `finish_reason`; an `error` ends the request."""

    index: int = 0  # which sequence
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScores, ...] = ()  # per token, the chosen one first
    cumulative_logprob: float = 0.0  # of the sequence so far
    prompt: PromptTable | None = None  # once in a request, if it asked for prompt_logprobs
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None  # "stop" | "length"
    error: RequestError | None = None
    last: bool = False  # of the request: nothing comes after it
