"""A runner without a model: its KV store holds token ids, its "model" hashes whatever the page table leads to.

A page that is handed out twice, freed too early or shared wrongly changes the tokens that come out, so comparing with
`solo` finds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np

from paged_backend.batch import Batch, BeamCandidates, BeamRows, StepResult
from paged_backend.request import SamplingParams
from paged_backend.scheduler.beam_search import BeamSearch, Candidates


def next_token(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> int:
    return crc32(np.asarray(tokens, np.int32).tobytes()) % vocab_size


def seen(tokens: Sequence[int] | np.ndarray, windows: Sequence[int | None]) -> list[int]:
    """What the "model" attends to after these tokens: all of them, or the last of each KV group's window."""
    tokens = list(tokens)
    return [token for window in windows for token in tokens[-window if window else None :]]


def solo(
    prompt: Sequence[int],
    length: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    windows: Sequence[int | None] = (None,),
) -> list[int]:
    """The answer a request must get, whatever runs beside it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length:
        tokens.append(next_token(seen(tokens, windows), vocab_size))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def continuations(tokens: Sequence[int] | np.ndarray, n: int, vocab_size: int) -> Candidates:
    """What the "model" finds likeliest after these tokens; after some, bans leave few or none."""
    random = np.random.default_rng(crc32(np.asarray(tokens, np.int32).tobytes()))
    logprobs = -np.sort(random.exponential(2, n)).astype(np.float32)
    if random.random() < 0.3:
        logprobs[random.integers(4) :] = -np.inf
    return Candidates(random.permutation(vocab_size)[:n].astype(np.int32), logprobs)


def solo_search(
    prompt: Sequence[int],
    sampling: SamplingParams,
    max_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    windows: Sequence[int | None] = (None,),
) -> list[list[int]]:
    """The answers a beam search must find, whatever runs beside it."""
    assert sampling.beam_width is not None
    search = BeamSearch(sampling.beam_width, stop_ids, max_tokens, sampling.length_penalty, sampling.early_stopping)
    while not search.over:
        contexts = [seen([*prompt, *beam.token_ids.tolist()], windows) for beam in search.beams]
        search.advance([continuations(context, vocab_size, vocab_size) for context in contexts])
    return [ending.beam.token_ids.tolist() for ending in search.endings[: sampling.n]]


class SimulatedRunner:
    def __init__(
        self,
        num_rows: int,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        max_batched_tokens: int,
        vocab_size: int = 97,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        """windows: of the KV groups."""
        self.vocab_size = vocab_size
        self._windows = windows
        self._table_width = -(-max_model_len // page_size)
        self._page_size = page_size
        self._budget = max_batched_tokens
        self._kv = np.full((num_pages, page_size), -1, np.int32)
        self._history = np.full((num_rows, max_model_len + 1), -1, np.int32)
        self._tables: list[dict[int, int]] = [{} for _ in range(num_rows)]
        self._in_flight: deque[tuple[Batch, StepResult]] = deque()
        self.num_tokens_computed = 0

    def launch(self, batch: Batch) -> None:
        assert len(set(batch.rows.tolist())) == len(batch.rows), "a row twice in one step"
        assert 0 < batch.num_tokens <= self._budget, "the token budget is exceeded, or the step is empty"
        for new in batch.new_rows:
            self._history[new.row] = -1
            self._history[new.row, : len(new.token_ids)] = new.token_ids
            self._tables[new.row] = {}
        for row, index, page in batch.page_updates.tolist():
            self._tables[row][index] = page
        for edit in batch.token_edits:
            self._history[edit.row, edit.start : edit.start + len(edit.token_ids)] = edit.token_ids
        sources, targets = batch.page_copies.T
        assert len(set(targets.tolist())) == len(targets) and not set(targets.tolist()) & set(sources.tolist()), (
            "a page is written twice, or read and written"
        )
        self._kv[targets] = self._kv[sources]
        steps = list(
            zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), batch.samples.tolist(), strict=True)
        )
        for row, start, count, _ in steps:  # all writes before all reads, as the layers do it
            for position in range(start, start + count):
                for group in range(len(self._windows)):
                    self._kv[self._slot(row, group, position)] = self._history[row, position]
        sampled = []
        contexts = []
        for row, start, count, samples in steps:
            end = start + count
            for group, window in enumerate(self._windows):
                for position in range(max(start - window + 1, 0) if window else 0, end):
                    assert self._kv[self._slot(row, group, position)] == self._history[row, position], (
                        "K and V of another token"
                    )
            if samples:
                firsts = [max(end - window, 0) if window else 0 for window in self._windows]
                contexts.append(
                    [
                        self._kv[self._slot(row, group, position)]
                        for group, first in enumerate(firsts)
                        for position in range(first, end)
                    ]
                )
                token = next_token(contexts[-1], self.vocab_size)
                self._history[row, end] = token
                sampled.append(token)
        self.num_tokens_computed += batch.num_tokens
        answers = tuple(self._candidates(ask, contexts) if isinstance(ask, BeamRows) else None for ask in batch.asks)
        self._in_flight.append((batch, StepResult(np.array(sampled, np.int32), answers=answers)))

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        while len(self._in_flight) > keep:
            yield self._in_flight.popleft()

    def _candidates(self, ask: BeamRows, contexts: list[list[int]]) -> BeamCandidates:
        found = [continuations(contexts[entry], self.vocab_size, self.vocab_size) for entry in ask.sampled.tolist()]
        n = min(ask.num_candidates, self.vocab_size)
        return BeamCandidates(
            np.stack([one.token_ids[:n] for one in found]), np.stack([one.logprobs[:n] for one in found])
        )

    def _slot(self, row: int, group: int, position: int) -> tuple[int, int]:
        return self._tables[row][group * self._table_width + position // self._page_size], position % self._page_size
