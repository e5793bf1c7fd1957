"""Requests to replay: shared heads, conversations, or what tests/bench/bench_cluster.py asked real servers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ANSWER_TOKEN = 1  # the only one that a simulated server knows
_FIRST_TOKEN, _LAST_TOKEN = 10, 100_000


@dataclass(frozen=True)
class Request:
    seconds: float  # of its arrival
    token_ids: NDArray[np.int32]
    output_tokens: int


def _tokens(dice: np.random.Generator, count: int) -> NDArray[np.int32]:
    return dice.integers(_FIRST_TOKEN, _LAST_TOKEN, count, np.int32)


def shared_heads(
    num_requests: int, rate: float, num_heads: int, head_tokens: int, own_tokens: int, output_tokens: int, seed: int
) -> list[Request]:
    """Each begins with one of `num_heads` heads, as system prompts or documents are; rate: requests a second."""
    dice = np.random.default_rng(seed)
    heads = [_tokens(dice, head_tokens) for _ in range(num_heads)]
    seconds, requests = 0.0, []
    for _ in range(num_requests):
        seconds += dice.exponential(1 / rate)
        own = _tokens(dice, int(dice.integers(own_tokens // 2, own_tokens * 3 // 2)))
        requests.append(Request(seconds, np.concatenate([heads[dice.integers(num_heads)], own]), output_tokens))
    return requests


def conversations(num_requests: int, rate: float, seed: int, max_len: int = 2048) -> list[Request]:
    """ShareGPT-like: log-normal turns with means of 161 tokens in and 338 out, as the PagedAttention paper states them,
    four turns a conversation on average; each turn's prompt is all that was said before and something new, 30 s after
    the turn before. Cut at max_len.
    """
    dice = np.random.default_rng(seed)

    def length(mean: float, sigma: float) -> int:
        return max(1, int(dice.lognormal(math.log(mean) - sigma * sigma / 2, sigma)))

    begins, requests = 0.0, []
    while len(requests) < num_requests:
        begins += dice.exponential(4 / rate)
        said, seconds = _tokens(dice, 0), begins
        for _ in range(int(dice.geometric(0.25))):
            said = np.concatenate([said, _tokens(dice, length(161, 1.2))])
            output_tokens = length(338, 0.9)
            if len(said) + output_tokens >= max_len:
                break
            requests.append(Request(seconds, said, output_tokens))
            said = np.concatenate([said, np.full(output_tokens, ANSWER_TOKEN, np.int32)])
            seconds += dice.exponential(30.0)
    return sorted(requests, key=lambda request: request.seconds)[:num_requests]


def recorded(path: Path, seed: int) -> Iterator[list[Request]]:
    """The rounds of a trace that bench_cluster wrote; each has heads of its own."""
    dice = np.random.default_rng(seed)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rounds: list[list[dict[str, float]]] = []
    for line in lines:
        if not rounds or line["seconds"] < rounds[-1][-1]["seconds"]:
            rounds.append([])
        rounds[-1].append(line)
    for asked in rounds:
        heads: dict[float, NDArray[np.int32]] = {}
        yield [
            Request(
                one["seconds"],
                np.concatenate(
                    [
                        heads.setdefault(one["head"], _tokens(dice, int(one["head_tokens"]))),
                        _tokens(dice, int(one["own_tokens"])),
                    ]
                ),
                int(one["output_tokens"]),
            )
            for one in asked
        ]
