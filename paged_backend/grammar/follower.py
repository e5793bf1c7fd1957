"""The process that follows grammars, as the engine's loop sees it: it is asked for masks and never waited for longer
than a step can spare.

A mask may take minutes and gigabytes, and the library does not stop when asked. Then the process is killed, the grammar
that it was at is refused, and the others begin again in the next process, with the tokens that they have.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.errors import ErrorKind
from paged_backend.grammar.follower_process import Begin, Drop, Follow, Followed, Forget, Look, ToFollower
from paged_backend.grammar.guide import Compiled, Guide, Refusal

# of a processor's time, for one mask; it has its own, stricter pace, which it can keep between the library's calls only
_MASK_SECONDS = 0.5
_TOKEN_SECONDS = 0.01  # more for each token that it is told
_LOAD_SECONDS = 2.0  # more for a grammar that it may have to read
_STANDSTILL_SECONDS = 60.0  # on the clock: a process that is stopped, or on a machine that swaps
_LOOK_SECONDS = 0.1  # how long it may be at one mask before somebody looks at its clock
_LATE_SECONDS = 0.02  # a step waits no more for a process that is at one mask for longer
# of a step: 1 ms and 0.3 ms a mask, which is what masks take; they wait in the step's own thread otherwise
_MAX_WAIT_SECONDS = 0.01
_MAX_DEATHS = 3  # of processes that were at a grammar: others may have killed them

log = logging.getLogger("paged")


class Link(Protocol):
    """See workers.FollowerLink; tests have their own."""

    def send(self, message: ToFollower) -> None: ...
    def flush(self) -> None: ...
    def replies(self) -> list[Followed]: ...
    def wait(self, seconds: float) -> None: ...
    def cpu_seconds(self) -> float: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class _Asked:
    guide: Guide
    num_tokens: int  # of the answer
    seconds: float  # that it may take
    looks: bool = False  # at drafts behind them


class Follower:
    """Owns what was asked and not answered. Used by one thread.

    Invariant: while there is a link, its process was asked about each guide in `_asked`, in that order.
    """

    def __init__(self, open_link: Callable[[], Link]) -> None:
        """open_link: called on a thread; may take seconds."""
        self._open_link = open_link
        self._threads = ThreadPoolExecutor(1, "follower")
        self._opening: Future[Link] | None = None
        self._link: Link | None = None
        self._epoch = 0  # of the link
        self._asked: deque[_Asked] = deque()
        self._over: deque[ToFollower] = deque()  # what is not needed any more; filled whenever objects go
        self._head: _Asked | None = None  # what the process is at, since when, and its clock then
        self._head_since = 0.0
        self._head_cpu: float | None = None

    def ask(self, guide: Guide, answer: Int32) -> None:
        """Has it followed as far as the answer goes, of which it knows the beginning. Goes out with the next `collect`
        or `wait`.
        """
        epoch, num_reported = guide.asked
        if guide.knows(len(answer)) or (epoch == self._epoch and num_reported == len(answer)):
            return
        compiled = guide.compiled_grammar()
        link = None if compiled is None else self._opened(guide)
        if link is None or compiled is None:
            return
        begins = epoch != self._epoch
        reported = answer if begins else answer[num_reported:]
        token_ids = np.ascontiguousarray(reported, np.int32).tobytes()
        link.send(self._beginning(guide, compiled, token_ids) if begins else Follow(guide.number, token_ids))
        guide.asked = (self._epoch, len(answer))
        self._asked.append(
            _Asked(
                guide, len(answer), _MASK_SECONDS + _TOKEN_SECONDS * len(reported) + (_LOAD_SECONDS if begins else 0)
            )
        )

    def look(self, guide: Guide, num_tokens: int, guesses: Int32, most: int) -> None:
        """Has it look at up to so many drafts behind the answer, which it was asked about last. Goes out as with
        `ask`.
        """
        if self._link is None or guide.asked != (self._epoch, num_tokens) or not guide.looks:
            return
        self._link.send(Look(guide.number, np.ascontiguousarray(guesses, np.int32).tobytes(), most))
        self._asked.append(_Asked(guide, num_tokens, _MASK_SECONDS, looks=True))

    def _beginning(self, guide: Guide, compiled: Compiled, token_ids: bytes) -> Begin:
        if not guide.noted:
            guide.noted = True
            weakref.finalize(guide, self._over.append, Forget(guide.number)).atexit = False
        if not compiled.noted:
            compiled.noted.append(True)
            weakref.finalize(compiled, self._over.append, Drop(compiled.number)).atexit = False
        own = b"" if guide.own is None else guide.own.tobytes()
        return Begin(
            guide.number,
            compiled.number,
            str(compiled.path),
            compiled.controls,
            guide.stop_ids,
            guide.min_tokens,
            own,
            token_ids,
        )

    def _opened(self, guide: Guide) -> Link | None:
        """None: not yet, or never for this guide."""
        if self._link is None:
            if self._opening is None:
                self._opening = self._threads.submit(self._open_link)
            if not self._opening.done():
                return None
            opening, self._opening = self._opening, None
            try:
                self._link = opening.result()
            except Exception as error:  # for want of memory, say; the next one tries again
                log.exception("grammars cannot be followed", exc_info=error)
                guide.refusal = Refusal(ErrorKind.INTERNAL, "it cannot be followed")
                return None
            self._epoch += 1
        return self._link

    def collect(self) -> None:
        """Sends what was asked, and takes in what has been answered. Never waits."""
        if self._link is None:
            return
        try:
            while self._over:
                self._link.send(self._over.popleft())
            self._link.flush()
            for reply in self._link.replies():
                asked = self._asked.popleft()
                if asked.looks:
                    asked.guide.take_look(reply, asked.num_tokens)
                else:
                    asked.guide.take(reply, asked.num_tokens)
        except EOFError:
            self._lose()
            return
        if self._asked:
            self._look_at_head(self._link)

    def wait(self) -> None:
        """For what was asked, as long as a step can spare: masks take some 0.1 ms each."""
        end = time.monotonic() + min(0.001 + 0.0003 * len(self._asked), _MAX_WAIT_SECONDS)
        self.collect()
        while self._asked and self._link is not None:
            now = time.monotonic()
            if now >= end or (self._head is not None and now > self._head_since + _LATE_SECONDS):
                return
            self._link.wait(end - now)
            self.collect()

    def _look_at_head(self, link: Link) -> None:
        head, now = self._asked[0], time.monotonic()
        if head is not self._head:
            self._head, self._head_since, self._head_cpu = head, now, None
        elif now > self._head_since + _LOOK_SECONDS:
            spent = self._spent(link)
            if spent > head.seconds and head.looks:
                head.guide.looks = False
                self._restart()
            elif spent > head.seconds:
                message = (
                    f"it is too slow to follow: what may come after {head.num_tokens} tokens takes more than "
                    f"{head.seconds:g} s to find out"
                )
                head.guide.refusal = Refusal(ErrorKind.INVALID, message)
                self._restart()
            elif now > self._head_since + _STANDSTILL_SECONDS:
                self._lose()

    def _spent(self, link: Link) -> float:
        """Seconds of a processor's time since somebody looked first."""
        try:
            cpu = link.cpu_seconds()
        except OSError:  # it is gone, which the connection will tell
            return 0.0
        if self._head_cpu is None:
            self._head_cpu = cpu
        return cpu - self._head_cpu

    def _lose(self) -> None:
        """The process died, or stands still: who knows why."""
        if self._asked and self._asked[0].looks:
            self._asked[0].guide.looks = False
        elif self._asked:
            guide = self._asked[0].guide
            guide.deaths += 1
            if guide.deaths >= _MAX_DEATHS:
                guide.refusal = Refusal(ErrorKind.INVALID, f"{guide.deaths} processes died while they followed it")
        log.warning("the process that follows grammars ended; another one goes on")
        self._restart()

    def _restart(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = self._head = None
        self._epoch += 1
        self._asked.clear()
        self._over.clear()
