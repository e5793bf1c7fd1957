"""Whose grammar is compiled next: callers in turns, and nobody behind a grammar that takes long.

Most are compiled in milliseconds, some take as long as they may. Each is tried for a moment first, and stopped and put into another lane if that is not
enough. One thread serves only first tries; the other serves those that take long, and first tries while there are none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from paged_backend.grammar.compiler_process import Verdict
from paged_backend.grammar.guide import Guide
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import GrammarError
from paged_backend.grammar.workers import COMPILE_SECONDS

TRY_SECONDS = 0.3  # of the first try, of a processor's time


class Compiler(Protocol):
    """What a thread compiles with (workers.GrammarCompiler; tests have their own). None: it takes longer than `seconds`."""

    def compile(self, grammar: Grammar, seconds: float) -> Verdict | None: ...


@dataclass(eq=False)
class Job:
    """A grammar to be compiled."""

    grammar: Grammar
    caller: str
    verdict: Future[Verdict] = field(default_factory=Future)
    waiting: WeakSet[Guide] = field(default_factory=WeakSet)  # who wants it; they may all have left


class _Lane:
    """Jobs of several callers: each has its turn, and its own jobs in their order."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, deque[Job]] = OrderedDict()

    def put(self, job: Job) -> None:
        self._jobs.setdefault(job.caller, deque()).append(job)

    def take(self) -> Job | None:
        if not self._jobs:
            return None
        caller, jobs = self._jobs.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._jobs[caller] = jobs
        return job


class CompileLanes:
    """Owns the two lanes and their threads, which are started with the first job."""

    def __init__(self, make_compiler: Callable[[], Compiler]) -> None:
        self._make_compiler = make_compiler
        self._first_tries, self._long = _Lane(), _Lane()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def put(self, job: Job) -> None:
        with self._changed:
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, args=(long_ones,), name="grammar", daemon=True) for long_ones in (False, True)]
                for thread in self._threads:
                    thread.start()
            self._first_tries.put(job)
            self._changed.notify_all()

    def _work(self, long_ones: bool) -> None:
        compiler: Compiler | None = None
        while True:
            job, first_try = self._next(long_ones)
            try:
                if not job.waiting:
                    raise GrammarError("nobody waits for it any more")
                compiler = compiler or self._make_compiler()
                verdict = compiler.compile(job.grammar, TRY_SECONDS if first_try else COMPILE_SECONDS)
            except Exception as error:
                job.verdict.set_exception(error)
                continue
            if verdict is None and first_try:
                with self._changed:
                    self._long.put(job)
                    self._changed.notify_all()
            else:
                job.verdict.set_result(verdict or Verdict(refusal=f"it takes more than {COMPILE_SECONDS:g} s to compile"))

    def _next(self, long_ones: bool) -> tuple[Job, bool]:
        """(job, whether it is its first try)."""
        with self._changed:
            while True:
                job = self._long.take() if long_ones else None
                if job is not None:
                    return job, False
                job = self._first_tries.take()
                if job is not None:
                    return job, True
                self._changed.wait()
