"""Some of these tests fill half of a GPU: what they leave in torch's cache is given back, for others may run beside
them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_MAX_KEPT_BYTES = 2 * 2**30


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > _MAX_KEPT_BYTES:
        torch.cuda.empty_cache()
