"""The hashes of 64 bits by which routers and front ends know pages: every engine gives the same to the same tokens,
unlike the prefix cache's own, which are keyed with a secret of the process. NVIDIA Dynamo keeps one tree for all
servers, and a node of it has one hash.

Chained as the cache's own: of the page's tokens and the hash of the page before; a prompt's first page follows tenant
and adapter.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def block_hashes_of(
    token_ids: NDArray[np.int32], page_size: int, lora_name: str | None = None, cache_salt: str = ""
) -> list[int]:
    """The hashes of a prompt's full pages."""
    hashes: list[int] = []
    for start in range(0, len(token_ids) // page_size * page_size, page_size):
        page = token_ids[start : start + page_size].tobytes()
        hashes.append(block_hash(page, hashes[-1] if hashes else None, lora_name, cache_salt))
    return hashes


def block_hash(token_ids: bytes, parent_hash: int | None, lora_name: str | None, cache_salt: str) -> int:
    """Of a page, int32 in native byte order. parent_hash: of the page before; None: it begins a prompt."""
    root = (
        f"{lora_name or ''}\0{cache_salt}".encode("utf-8", "surrogatepass")
        if parent_hash is None
        else parent_hash.to_bytes(8, "big")
    )
    return int.from_bytes(blake2b(root + b"\0" + token_ids, digest_size=8).digest(), "big")
