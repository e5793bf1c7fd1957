"""A piece of an answer on its way to the caller."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from paged_backend.errors import RequestError
from paged_backend.frontend.prompt_logprobs import PromptTable
from paged_backend.messages import TokenScores


@dataclass(frozen=True)
class Embedding:
    """A prompt's, as the caller asked for it."""

    values: NDArray[np.float32]  # [dimensions]


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of answer, ready to send: of one of the request's sequences. A sequence's last has `finish_reason`; an
    `error` ends the request.
    """

    index: int = 0  # which sequence
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScores, ...] = ()  # per token, the chosen one first
    cumulative_logprob: float = 0.0  # of the sequence so far
    # once in a request, if it asked for prompt_logprobs or for an embedding
    prompt: PromptTable | Embedding | None = None
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None  # "stop" | "length"
    error: RequestError | None = None
    last: bool = False  # of the request: nothing comes after it
