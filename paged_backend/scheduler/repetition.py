"""How far a text repeats itself at its end: what tells drafts that are worth computing from those that are not.

Drafts from a row's own text are what came after the last place where it went as it goes now (kernels/ngram.py). The
more tokens are alike there, the likelier they are right: a pair comes back by chance, eight in a row do not. So a
sequence has as many drafts as tokens are alike beyond the first, and none where nothing repeats. (The rule is that of
suffix decoding, Oliaro et al., 2024.)
"""

from __future__ import annotations

import numpy as np

from paged_backend.arrays import Int32

# as the kernel has them (paged_kernels.reference_rows); this wing imports no torch
LONGEST, SHORTEST = 8, 2  # tokens
SEARCHED = 16_384  # newest tokens


def num_alike(token_ids: Int32) -> int:
    """How many of the newest tokens, LONGEST at most, stand in the same order before another place of the text's newest
    SEARCHED tokens; 0 where fewer than SHORTEST do.

    token_ids: int32 [n], all that are known.
    """
    tokens = token_ids[-SEARCHED:]
    places = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1 if len(tokens) else np.empty(0, np.intp)
    alike = 0
    while len(places) and alike < LONGEST:
        alike += 1
        places = places[places > alike]
        places = places[tokens[places - alike - 1] == tokens[-alike - 1]]
    return alike if alike >= SHORTEST else 0
