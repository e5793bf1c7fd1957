"""Documents to token ids, and token ids to rows of one length, a training batch's unit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

IGNORED = -100  # transformers' loss leaves out labels of this value
_OPEN_ROWS = 256
_DOCUMENTS_AT_ONCE = 256


def token_rows(tokenizer: Tokenizer, texts: Iterator[str], row_len: int, eos_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields rows of whole documents without end: (ids, labels), each int64 [row_len]. The rest of a row is `eos_id`, its labels IGNORED.

    A document goes to the fullest open row that has room for it; one longer than a row is left out. The fullest row is yielded when too many are open.
    """
    rows: list[list[int]] = []
    while True:
        for encoding in tokenizer.encode_batch(list(islice(texts, _DOCUMENTS_AT_ONCE)), add_special_tokens=False):
            ids = encoding.ids
            if len(ids) > row_len:
                continue
            row = max((row for row in rows if len(row) + len(ids) <= row_len), key=len, default=None)
            if row is None:
                rows.append(row := [])
            row.extend(ids)
            if len(rows) > _OPEN_ROWS:
                rows.remove(fullest := max(rows, key=len))
                rest = row_len - len(fullest)
                yield torch.tensor(fullest + [eos_id] * rest), torch.tensor(fullest + [IGNORED] * rest)


def batches(rows: Iterator[tuple[Tensor, Tensor]], num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, labels), each int64 [num_rows, row_len]."""
    while True:
        ids, labels = zip(*islice(rows, num_rows), strict=True)
        yield torch.stack(ids), torch.stack(labels)
