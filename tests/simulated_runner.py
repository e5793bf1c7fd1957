"""A runner without a model: its KV store holds token ids, its "model" hashes whatever the page table leads to.

A page that is handed out twice, freed too early or shared wrongly changes the tokens that come out, so comparing with
`solo` finds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

import numpy as np

from paged_backend.batch import Batch, BeamCandidates, BeamRows, StepResult
from paged_backend.request import SamplingParams
from paged_backend.scheduler.beam_search import BeamSearch, Candidates
from paged_backend.scheduler.limits import SchedulerLimits


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


class Proposer:
    """Drafts that are right with some probability each: guesses with a known quality."""

    def __init__(self, quality: float, vocab_size: int, windows: Sequence[int | None] = (None,)) -> None:
        self._quality, self._vocab_size, self._windows = quality, vocab_size, windows
        self._random = np.random.default_rng(0)

    def __call__(self, tokens: list[int], num_drafts: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(num_drafts):
            token = next_token(seen(tokens, self._windows), self._vocab_size)
            wrong = self._random.random() >= self._quality
            tokens.append(int(self._random.integers(self._vocab_size)) if wrong else token)
        return tokens[-num_drafts:]


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
        propose: Callable[[list[int], int], list[int]] | None = None,
    ) -> None:
        """windows: of the KV groups. propose: so many drafts for a row with these tokens; None: steps have none."""
        self.vocab_size = vocab_size
        self._windows = windows
        self._table_width = -(-max_model_len // page_size)
        self._page_size = page_size
        self._budget = max_batched_tokens
        self._kv = np.full((num_pages, page_size), -1, np.int32)
        self._history = np.full((num_rows, max_model_len + 1), -1, np.int32)
        self._lengths = [0] * num_rows  # tokens of each row, which only the device knows while drafts are in flight
        self._propose = propose
        self._tables: list[dict[int, int]] = [{} for _ in range(num_rows)]
        self._in_flight: deque[tuple[Batch, StepResult]] = deque()
        self.num_tokens_computed = 0

    def launch(self, batch: Batch) -> None:
        assert len(set(batch.rows.tolist())) == len(batch.rows), "a row twice in one step"
        assert 0 < batch.num_tokens <= self._budget, "the token budget is exceeded, or the step is empty"
        for new in batch.new_rows:
            self._history[new.row] = -1
            self._history[new.row, : len(new.token_ids)] = new.token_ids
            self._lengths[new.row] = len(new.token_ids)
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
        steps = self._with_drafts(batch)
        for row, start, count, _, _ in steps:  # all writes before all reads, as the layers do it
            for group in range(len(self._windows)):
                self._kv[self._slots(row, group, start, start + count)] = self._history[row, start : start + count]
        sampled = []
        contexts: list[np.ndarray] = []
        for row, start, count, samples, num_drafts in steps:
            end = start + count
            for group, window in enumerate(self._windows):
                first = max(start - window + 1, 0) if window else 0
                found = self._kv[self._slots(row, group, first, end)]
                assert np.array_equal(found, self._history[row, first:end]), "K and V of another token"
            if samples:
                ends = range(end - num_drafts, end + 1)
                read = [self._context(row, end) for end in ends]
                contexts.append(read[0])
                sampled += self._accept(row, ends, [next_token(context, self.vocab_size) for context in read])
        self.num_tokens_computed += batch.num_tokens
        answers = tuple(self._candidates(ask, contexts) if isinstance(ask, BeamRows) else None for ask in batch.asks)
        self._in_flight.append((batch, StepResult(np.array(sampled, np.int32), answers=answers)))

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        while len(self._in_flight) > keep:
            yield self._in_flight.popleft()

    def _with_drafts(self, batch: Batch) -> list[tuple[int, int, int, bool, int]]:
        """(row, first position, tokens, whether it samples, drafts) of each sequence; the drafts lie behind the rows'
        tokens.
        """
        num_sequences = len(batch.rows)
        drafts = [0] * num_sequences if batch.drafts is None else batch.drafts.counts.tolist()
        unsure = [0] * num_sequences if batch.drafts is None else batch.drafts.unsure.tolist()
        columns = batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), batch.samples.tolist()
        steps = []
        for row, start, count, samples, num_drafts, more in zip(*columns, drafts, unsure, strict=True):
            length = self._lengths[row]
            if more:
                assert start - more <= length - 1 <= start, "the length is not within its bounds"
                start = length - 1
            if num_drafts:
                assert self._propose is not None and samples and start == length - 1 and count == 1 + num_drafts
                self._history[row, length : length + num_drafts] = self._propose(
                    self._history[row, :length].tolist(), num_drafts
                )
            steps.append((row, start, count, samples, num_drafts))
        return steps

    def _context(self, row: int, end: int) -> np.ndarray:
        """What the "model" finds in the pages of a row's first `end` tokens."""
        firsts = [max(end - window, 0) if window else 0 for window in self._windows]
        kept = [self._kv[self._slots(row, group, first, end)] for group, first in enumerate(firsts)]
        return np.concatenate(kept)

    def _accept(self, row: int, ends: range, token_ids: list[int]) -> list[int]:
        """token_ids: sampled behind the row's newest token and each draft. Those behind a wrong draft become -1."""
        for place, (end, token) in enumerate(zip(ends, token_ids, strict=True)):
            right = end < ends[-1] and self._history[row, end] == token
            self._history[row, end] = token
            self._lengths[row] = end + 1
            if not right:
                return token_ids[: place + 1] + [-1] * (len(token_ids) - place - 1)
        return token_ids

    def _candidates(self, ask: BeamRows, contexts: list[np.ndarray]) -> BeamCandidates:
        found = [continuations(contexts[entry], self.vocab_size, self.vocab_size) for entry in ask.sampled.tolist()]
        n = min(ask.num_candidates, self.vocab_size)
        return BeamCandidates(
            np.stack([one.token_ids[:n] for one in found]), np.stack([one.logprobs[:n] for one in found])
        )

    def _slots(self, row: int, group: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Pages and places in them of the positions from `first` to before `end`."""
        table, offset, size = self._tables[row], group * self._table_width, self._page_size
        pages = np.array([table[offset + index] for index in range(first // size, (end - 1) // size + 1)])
        positions = np.arange(first, end)
        return pages[positions // size - first // size], positions % size


class TimedRunner(SimulatedRunner):
    """One whose device computes a step after the other, each in as many seconds as a test says; the host takes none."""

    def __init__(
        self,
        limits: SchedulerLimits,
        seconds: Callable[[Batch], float],
        vocab_size: int = 97,
        propose: Callable[[list[int], int], list[int]] | None = None,
    ) -> None:
        sizes = limits.num_pages, limits.page_size, limits.max_model_len, limits.max_batched_tokens
        super().__init__(limits.max_num_sequences, *sizes, vocab_size, limits.windows, propose)
        self.now = 0.0  # as the host knows it: the end of the newest step whose result it has read
        self._seconds = seconds
        self._ends: list[float] = []

    def launch(self, batch: Batch) -> None:
        super().launch(batch)
        begins = max([self.now, *self._ends[-1:]])
        self._ends.append(begins + self._seconds(batch))

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        for batch, result in super().finished(keep):
            self.now = max(self.now, self._ends[batch.step - 1])
            yield batch, result
