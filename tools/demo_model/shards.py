"""Conversations to rows of token ids: the training text in shards, each written and tokenised by a process of its own.

A row is int16: the token's id in the lower 12 bits, and above them how much it counts in the loss (`chat.Weight`).
Shard number i is the same whoever writes it and whenever: its seed is its number.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tools.demo_model.chat import THINK, Conversation, Dialogue, Weight
from tools.demo_model.generator import conversations
from tools.demo_model.mixture import mixture
from tools.demo_model.vocabulary import BOS_ID, EOS_ID, role_ids, train_tokenizer
from tools.demo_model.world import Split

ID_BITS = 12
ROW_LEN = 2048
_OPEN_ROWS = 40
_CONVERSATIONS_AT_ONCE = 64
_TOKENIZER_SEED = "tokenizer"

Rows = NDArray[np.int16]  # [num_rows, row_len]


@dataclass(frozen=True)
class ShardPlan:
    """How the text is cut up: the first shards are short conversations, where looking things up is learned fastest."""

    rows_per_shard: int = 512
    row_len: int = ROW_LEN
    early_shards: int = 32
    mixture: str = "conversations"  # one of mixture.MIXTURES, after the early shards

    def seed(self, number: int) -> str:
        return f"shard {number}"


def make_tokenizer(num_conversations: int = 12_000) -> Tokenizer:
    """The tokenizer, trained on conversations of its own seed."""
    found = islice(conversations(_TOKENIZER_SEED, Split.TRAIN), num_conversations)
    return train_tokenizer(
        text for each in found for text in ([each.text] if each.text else [turn.text for turn in each.turns])
    )


def encoded(tokenizer: Tokenizer, found: Iterable[Conversation | Dialogue]) -> Iterator[list[int]]:
    """Yields every conversation's ids, each with its weight above it."""
    some, roles = list(found), role_ids(tokenizer)
    texts = [
        text for each in some for text in ([each.text] if each.text is not None else [turn.text for turn in each.turns])
    ]
    ids = iter([encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
    for each in some:
        if each.text is not None:
            yield [BOS_ID, *_weighed(next(ids), Weight.FREE), _with(EOS_ID, Weight.FREE)]
            continue
        row = [BOS_ID]
        for turn in each.turns:
            row.append(_with(roles[turn.role], Weight.GIVEN))
            written = _weighed(next(ids), turn.weight)
            if turn.text.startswith(THINK):  # the prompt opens the thought: whether to think is not the model's choice
                written[0] = _with(written[0] & (1 << ID_BITS) - 1, Weight.NONE)
            row += written
            row.append(_with(EOS_ID, turn.weight))
        yield row


def _with(token_id: int, weight: Weight) -> int:
    return token_id | weight.value << ID_BITS


def _weighed(ids: list[int], weight: Weight) -> list[int]:
    code = weight.value << ID_BITS
    return [token_id | code for token_id in ids]


def packed(encodings: Iterator[list[int]], row_len: int) -> Iterator[list[int]]:
    """Yields rows of whole conversations without end; the rest of a row is EOS that does not count. Conversations
    longer than a row are left out.

    A conversation goes to the fullest open row that has room for it. The fullest row is yielded when too many are open.
    """
    rows: list[list[int]] = []
    for ids in encodings:
        if len(ids) > row_len:
            continue
        row = max((row for row in rows if len(row) + len(ids) <= row_len), key=len, default=None)
        if row is None:
            rows.append(row := [])
        row.extend(ids)
        if len(rows) > _OPEN_ROWS or len(row) == row_len:
            rows.remove(fullest := max(rows, key=len))
            yield fullest + [EOS_ID] * (row_len - len(fullest))


def write_shard(tokenizer: Tokenizer, plan: ShardPlan, number: int, split: Split = Split.TRAIN) -> Rows:
    """Shard `number`: int16 [rows_per_shard, row_len]."""
    stream = mixture("early" if number < plan.early_shards else plan.mixture, plan.seed(number), split)
    encodings = (ids for _ in iter(int, 1) for ids in encoded(tokenizer, islice(stream, _CONVERSATIONS_AT_ONCE)))
    return np.array(list(islice(packed(encodings, plan.row_len), plan.rows_per_shard)), np.int16)


def token_ids(rows: Rows) -> NDArray[np.int64]:
    """The rows' ids without the weights."""
    return (rows & ((1 << ID_BITS) - 1)).astype(np.int64)


@contextmanager
def shard_stream(tokenizer: Tokenizer, plan: ShardPlan, first: int, num_processes: int) -> Iterator[Iterator[Rows]]:
    """The shards from number `first` on, in order, written ahead by as many processes. Without processes they are
    written when asked for.
    """
    if num_processes == 0:
        yield (write_shard(tokenizer, plan, number) for number in range(first, 1 << 30))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")  # the workers need nothing but the generator, which is there already
    with context.Pool(num_processes, initializer=os.nice, initargs=(5,)) as pool:
        yield _ahead(pool, partial(_shard_of, tokenizer.to_str(), plan), first, 3 * num_processes)


def _ahead(pool: multiprocessing.pool.Pool, write: partial[Rows], first: int, num_ahead: int) -> Iterator[Rows]:
    """At most `num_ahead` shards wait to be read."""
    pending = [pool.apply_async(write, (first + index,)) for index in range(num_ahead)]
    number = first + num_ahead
    while True:
        yield pending.pop(0).get()
        pending.append(pool.apply_async(write, (number,)))
        number += 1


def _shard_of(tokenizer: str, plan: ShardPlan, number: int) -> Rows:
    return write_shard(_read_tokenizer(tokenizer), plan, number)


_tokenizers: dict[str, Tokenizer] = {}  # of a worker: one


def _read_tokenizer(text: str) -> Tokenizer:
    if text not in _tokenizers:
        _tokenizers[text] = Tokenizer.from_str(text)
    return _tokenizers[text]
