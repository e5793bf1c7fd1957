"""How many sequences may run at once, where max_num_sequences leaves it open: what a card's memory is good for."""

from __future__ import annotations

import torch

from paged_backend.runner.kv_store import MemoryNeeds
from paged_backend.units import spell_bytes

_ON_LARGE_CARDS = (1024, 512)
_ELSEWHERE = 256
_TOKENS_EACH = 512  # of a prompt and its answer; with fewer in the pool for each, most would wait or be preempted
_FREE_BYTES_EACH = 32 * 2**20  # of the device, after the weights: 32 GiB for 1,024
_LARGEST_SHARE = 8  # what the larger step takes of the device must not be more than this part of what is free


def sequence_limits(device: torch.device, free: int, num_tokens: int) -> list[int]:
    """What is to be tried, the most first. free: bytes of the device after the weights. num_tokens: that a pool of all
    of it would hold.
    """
    large = [
        limit
        for limit in _ON_LARGE_CARDS
        if device.type == "cuda" and free >= limit * _FREE_BYTES_EACH and num_tokens >= limit * _TOKENS_EACH
    ]
    return [*large, _ELSEWHERE]


def affordable(needs: MemoryNeeds, free: int) -> bool:
    """Whether steps of so many sequences, as measured, leave the pool most of the memory."""
    return needs.step + needs.graphs <= free // _LARGEST_SHARE


def about_limit(limit: int, free: int, num_tokens: int) -> str:
    """A sentence for the log."""
    return (
        f"max_num_sequences: {limit}, chosen because {spell_bytes(free)} are free after the weights, "
        f"up to {num_tokens // limit} tokens of a pool for each sequence"
    )
