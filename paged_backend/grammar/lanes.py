"""Whose grammar is compiled next: callers in turns, and nobody behind a grammar that takes long.

Most are compiled in milliseconds, some take as long as they may. Each is tried for a moment first, and stopped and put
into the next lane, for a longer try, if that is not enough. One thread serves the short tries alone; the other serves
those that take long, and short tries while there are none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from paged_backend.grammar.compiler_process import Verdict
from paged_backend.grammar.guide import Guide
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import GrammarError
from paged_backend.grammar.workers import COMPILE_SECONDS

TRIES_SECONDS = (0.05, 0.4, COMPILE_SECONDS)  # of a processor's time, in the first lane, the second, the last


class Compiler(Protocol):
    """What a thread compiles with (workers.GrammarCompiler; tests have their own). None: it takes longer than
    `seconds`.
    """

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
    """Owns the lanes and two threads, which are started with the first job."""

    def __init__(self, make_compiler: Callable[[], Compiler]) -> None:
        self._make_compiler = make_compiler
        self._lanes = [_Lane() for _ in TRIES_SECONDS]
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def put(self, job: Job) -> None:
        with self._changed:
            if not self._threads:
                short, last = self._lanes[:-1], self._lanes[-1]
                orders = (short, [last, *short])  # in which a thread looks at them
                self._threads = [
                    threading.Thread(target=self._work, args=(order,), name="grammar", daemon=True) for order in orders
                ]
                for thread in self._threads:
                    thread.start()
            self._lanes[0].put(job)
            self._changed.notify_all()

    def _work(self, order: Sequence[_Lane]) -> None:
        compiler: Compiler | None = None
        while True:
            job, lane = self._next(order)
            number = self._lanes.index(lane)
            try:
                if not job.waiting:
                    raise GrammarError("nobody waits for it any more")
                compiler = compiler or self._make_compiler()
                verdict = compiler.compile(job.grammar, TRIES_SECONDS[number])
            except Exception as error:
                job.verdict.set_exception(error)
                continue
            if verdict is None and lane is not self._lanes[-1]:
                with self._changed:
                    self._lanes[number + 1].put(job)
                    self._changed.notify_all()
            else:
                job.verdict.set_result(
                    verdict or Verdict(refusal=f"it takes more than {COMPILE_SECONDS:g} s to compile")
                )

    def _next(self, order: Sequence[_Lane]) -> tuple[Job, _Lane]:
        """The job whose turn it is, and where it was."""
        with self._changed:
            while True:
                for lane in order:
                    job = lane.take()
                    if job is not None:
                        return job, lane
                self._changed.wait()
