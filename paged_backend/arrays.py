"""Array types that every wing speaks of, and sets of token ids as words of bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def bits(token_ids: Sequence[int], vocab_size: int) -> Int32:
    """int32 [words]: a bit per token, the first in the lowest."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def floats(bits: Int32) -> NDArray[np.float32]:
    """The float32 whose bits these are; a copy."""
    return np.array(bits, order="C").view(np.float32)
