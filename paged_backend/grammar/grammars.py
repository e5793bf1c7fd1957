"""Structured output: grammars are compiled beside the engine and kept; each sequence that follows one has a guide
(guide.py), which knows what may come next.

Nothing of a grammar is worked on in the engine's own process: callers write grammars, some of which take minutes and
gigabytes, and the library does not stop when asked. They are compiled (lanes.py) and followed (follower.py) in
processes that are killed when it takes too long (workers.py).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from weakref import finalize

from paged_backend.arrays import Int32
from paged_backend.grammar import nursery
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace
from paged_backend.grammar.follower import Follower, Link
from paged_backend.grammar.guide import Compiled, Guide
from paged_backend.grammar.lanes import CompileLanes, Compiler, Job
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import GrammarError
from paged_backend.grammar.workers import FollowerLink, GrammarCompiler, Workers

_MAX_CACHED = 512  # grammars
_MAX_CACHED_BYTES = 512 * 2**20

_Key = tuple[str, str, bool]


class Workshop(Protocol):
    """Where grammars are compiled and followed: in processes; tests have their own."""

    def compiler(self) -> Compiler: ...
    def follower(self) -> Link: ...


class Processes:
    """Children of one nursery."""

    def __init__(self, place: VocabularyPlace) -> None:
        self._workers = Workers(place)

    def compiler(self) -> Compiler:
        return GrammarCompiler(self._workers)

    def follower(self) -> Link:
        return FollowerLink(self._workers.make(nursery.FOLLOW))


class Grammars:
    """Compiles grammars, the same one once, and keeps those that were wanted last."""

    def __init__(
        self,
        tokenizer_path: Path | None,
        vocab_size: int,
        eos_ids: Collection[int],
        make_workshop: Callable[[VocabularyPlace], Workshop] = Processes,
    ) -> None:
        """tokenizer_path: a tokenizer.json in a folder of our own; None: the model has none, and nothing can be
        compiled. vocab_size: of the logits.
        """
        self._tokenizer_path = tokenizer_path
        self._workshop = make_workshop(VocabularyPlace(str(tokenizer_path), vocab_size, tuple(eos_ids)))
        self._lanes = CompileLanes(self._make_compiler)
        self.follower = Follower(self._workshop.follower)
        self._lock = Lock()
        self._jobs: dict[_Key, Job] = {}  # of those that are not compiled yet
        self._compiled: OrderedDict[_Key, Future[Compiled]] = OrderedDict()  # the last wanted last
        self._numbers = count()

    def guide(
        self, grammar: Grammar, stop_ids: Sequence[int], min_tokens: int, allowed: Int32 | None = None, caller: str = ""
    ) -> Guide:
        """A guide for a new sequence; its grammar may still have to be compiled. allowed: as Guide's `own`. caller:
        whose turn it is.
        """
        key = grammar.kind, grammar.text, grammar.compact
        with self._lock:
            known = self._compiled.get(key)
            job = self._jobs.get(key)
            new = known is None or _failed_by_chance(known)
            if new:
                known = self._compiled[key] = Future()
                job = self._jobs[key] = Job(grammar, caller)
                self._forget_some()
            assert known is not None
            self._compiled.move_to_end(key)
            guide = Guide(grammar.key, known, stop_ids, min_tokens, allowed)
            if job is not None:
                job.waiting.add(guide)
        if new:
            assert job is not None
            compiled, mine = known, job  # of this job, whatever the key leads to later
            mine.verdict.add_done_callback(lambda verdict: self._conclude(key, mine, compiled, verdict))
            self._lanes.put(mine)
        return guide

    def _make_compiler(self) -> Compiler:
        if self._tokenizer_path is None:
            raise GrammarError("this model has no tokenizer")
        return self._workshop.compiler()

    def _conclude(self, key: _Key, job: Job, compiled: Future[Compiled], verdict: Future[Verdict]) -> None:
        """On a thread of the lanes. Whoever asked for it may have left while others' were compiled, and somebody else
        may have come since.
        """
        with self._lock:
            newest = self._jobs.get(key) is job
            if newest:
                del self._jobs[key]
            unwanted = not job.waiting
            if newest and unwanted and self._compiled.get(key) is compiled:
                del self._compiled[key]
        try:
            compiled.set_result(self._keep(verdict.result()))
        except Exception as error:
            compiled.set_exception(error)

    def _keep(self, verdict: Verdict) -> Compiled:
        if verdict.refusal:
            raise GrammarError(verdict.refusal, verdict.kind)
        assert self._tokenizer_path is not None
        number = next(self._numbers)
        path = self._tokenizer_path.with_name(f"grammar-{os.getpid()}-{id(self)}-{number}.json")
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(verdict.serialised)
        compiled = Compiled(number, path, verdict.controls, verdict.num_bytes)
        finalize(compiled, path.unlink, missing_ok=True).atexit = False  # the folder goes with the engine
        return compiled

    def _forget_some(self) -> None:
        """Drops what was not wanted for longest, until the bounds are kept. Who follows a grammar keeps it."""
        sizes = {key: _size(future) for key, future in self._compiled.items()}
        excess = sum(sizes.values()) - _MAX_CACHED_BYTES
        for key in list(sizes)[:-1]:
            if excess <= 0 and len(self._compiled) <= _MAX_CACHED:
                return
            excess -= sizes[key]
            del self._compiled[key]


def _failed_by_chance(future: Future[Any]) -> bool:
    """Not because of the grammar or the model: for want of memory, say. Then it is tried again."""
    return future.done() and future.exception() is not None and not isinstance(future.exception(), GrammarError)


def _size(future: Future[Compiled]) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    return future.result().num_bytes
