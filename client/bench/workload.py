"""What a benchmark sends: lengths of prompts and answers, and prompts of those lengths as perf_analyzer's input
data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paged_backend.errors import EngineError

# Means of ShareGPT as the PagedAttention paper states them (Kwon et al., SOSP 2023, section 6.1); the spreads make its
# long tails.
SHAREGPT_PROMPT, SHAREGPT_ANSWER = (161.0, 1.2), (338.0, 0.9)  # mean tokens, sigma of the logarithm
# ids that every vocabulary has, clear of the special tokens at its start and its end
_LOWEST_ID, _HIGHEST_ID = 100, 1000
# Short words which nearly every tokenizer knows as one token.
_SENTENCE = (
    "the of and to in that was for on with as his they at be this from have or by one had not but what all were "
    "when we there can an your which their said if "
    "each about how up out them then she many some so these would other into has more her two like him see time "
    "could no make than first been its who now my"
)
_WORDS = tuple(_SENTENCE.split())


@dataclass(frozen=True)
class Span:
    """Lengths in tokens, uniform from `low` to `high`; equal: fixed."""

    low: int
    high: int

    @classmethod
    def parse(cls, option: str, value: str) -> Span:
        """ "128" or "32:512".

        Raises:
            EngineError: names the option, the value and what is allowed.
        """
        low, colon, high = value.partition(":")
        try:
            span = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            raise EngineError(f"{option} {value}: expected a number of tokens, or a range such as 32:512") from None
        if not 1 <= span.low <= span.high:
            raise EngineError(
                f"{option} {value}: expected 1 or more tokens" + (", the lower end first" if colon else "")
            )
        return span

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Workload:
    """The mix of requests. The same seed gives the same lengths; another nonce gives other tokens, which no prefix
    cache knows from a benchmark before.
    """

    prompt: Span | None  # None: ShareGPT-like
    answer: Span | None
    longest: int = 2048  # prompt plus answer, of ShareGPT-like lengths
    shared_prefix: int = 0  # tokens that prompts begin with, in front of their own
    num_prefixes: int = 1  # different ones, taken in turn
    temperature: float = 0.0
    seed: int = 0
    nonce: int = 0

    def describe(self) -> str:
        lengths = f"{self.prompt} tokens in, {self.answer} out"
        if self.prompt is None:
            lengths = f"ShareGPT-like lengths, up to {self.longest:,} tokens"
        prefixes = "" if self.num_prefixes == 1 else f" ({self.num_prefixes} different)"
        return lengths + (f", behind a shared prefix of {self.shared_prefix}{prefixes}" if self.shared_prefix else "")

    @property
    def longest_request(self) -> tuple[int, int]:
        """Tokens in and out of a request as long as they come."""
        if self.prompt is None or self.answer is None:
            return self.shared_prefix + self.longest // 2, self.longest - self.longest // 2
        return self.shared_prefix + self.prompt.high, self.answer.high


@dataclass(frozen=True)
class Request:
    """One request to send: its prompt's tokens as numbers (ids, or indices of words), and the length of its answer."""

    prompt: NDArray[np.int64]
    answer: int


def make_requests(workload: Workload, count: int, round_number: int = 0) -> list[Request]:
    """`count` requests; another `round_number` gives others of the same kind (the shared prefixes stay)."""
    prompts, answers = _lengths(workload, count, np.random.default_rng([workload.seed, round_number]))
    prefixes = np.random.default_rng(workload.nonce).integers(
        _LOWEST_ID, _HIGHEST_ID, (workload.num_prefixes, workload.shared_prefix)
    )
    tokens = np.random.default_rng([workload.nonce, round_number])
    return [
        Request(
            np.concatenate([prefixes[index % workload.num_prefixes], tokens.integers(_LOWEST_ID, _HIGHEST_ID, prompt)]),
            int(answer),
        )
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def _lengths(
    workload: Workload, count: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if workload.prompt is None or workload.answer is None:
        limit = workload.longest // 2
        return _log_normal(random, *SHAREGPT_PROMPT, count, limit), _log_normal(random, *SHAREGPT_ANSWER, count, limit)
    prompts = random.integers(workload.prompt.low, workload.prompt.high + 1, count)
    return prompts, random.integers(workload.answer.low, workload.answer.high + 1, count)


def _log_normal(random: np.random.Generator, mean: float, sigma: float, count: int, limit: int) -> NDArray[np.int64]:
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn.round().astype(np.int64), 1, limit)


def sampling_parameters(workload: Workload, answer: int) -> str:
    """Asks for exactly `answer` tokens, whatever the model would like to say."""
    return json.dumps({"max_tokens": answer, "ignore_eos": True, "temperature": workload.temperature})


def as_text(prompt: NDArray[np.int64], tokens_per_word: float) -> str:
    """About as many tokens of common words; equal numbers give equal words."""
    num_words = max(round(len(prompt) / tokens_per_word), 1)
    return " ".join(_WORDS[number % len(_WORDS)] for number in np.resize(prompt, num_words))


def write_input_data(
    file: Path,
    workload: Workload,
    requests: Sequence[Request],
    *,
    as_ids: bool,
    tokens_per_word: float,
    count_tokens: bool,
) -> None:
    """perf_analyzer's `--input-data`: one step a request, sent in this order."""
    steps = []
    for request in requests:
        step: dict[str, Any] = {
            "stream": [True],
            "sampling_parameters": [sampling_parameters(workload, request.answer)],
        }
        if as_ids:
            step["input_ids"] = {"content": request.prompt.tolist(), "shape": [len(request.prompt)]}
        else:
            step["text_input"] = [as_text(request.prompt, tokens_per_word)]
        if count_tokens:
            step["return_num_output_tokens"] = [True]
        steps.append(step)
    file.write_text(json.dumps({"data": steps}))
