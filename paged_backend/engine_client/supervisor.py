"""Which engine process a front end speaks to: the one it starts, and restarts when it dies, or the one that another
front end does that for.

The front ends of a model elect the one that owns the engine (election.py); the others wait for what it starts. The
engine outlives its owner as long as any front end lives (life_line.py): another one inherits it, and nobody's stream
stops.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from paged_backend.config import EngineConfig
from paged_backend.engine_client.election import Election, Incarnation, Outlook
from paged_backend.engine_client.inherited_engine import InheritedEngine
from paged_backend.engine_client.link import EngineLink
from paged_backend.engine_client.starter import EngineStarter, wait_for_exit
from paged_backend.errors import EngineError
from paged_backend.life_line import create_life_line, hold_life_line, wait_for_ranks
from paged_backend.messages import (
    ENGINE_SOCKET,
    QUEUE_FILE,
    RUNNING_FILE,
    SUSPECT_FILE,
    Failed,
    Goodbye,
    Ready,
    Shutdown,
)
from paged_backend.process_id import ProcessId

_LINGER_MS = 1000  # for the last goodbye
# with the requests of other front ends. Their goodbyes may come only later: Triton Server finalizes instances one after
# another
_PATIENCE_SECONDS = 1.0
_RESTART_WINDOW_SECONDS = 600.0  # max_engine_restarts counts within it
_QUICK_DEATH_SECONDS = 30.0  # after the restart before; the next restart then waits a little
_LONGEST_PAUSE_SECONDS = 5.0
# until a new engine has opened its socket, which it does before it loads anything; more where imports take long
_BEGIN_SECONDS = 30.0
_OWNER_SECONDS = 0.5  # between looks whether the owner lives
_FRESHEN_SECONDS = 3600.0  # between touches of the folder's files; cleaners look at days
_RANKS_SECONDS = 10.0  # they are killed with the engine; a GPU's driver may take a while to let one go
# times the first load: a restart that takes longer hangs, if that is more than engine_hang_seconds
_LOAD_PATIENCE = 4.0

log = logging.getLogger("paged")


class EngineSupervisor:
    """Owns the process, if this front end started it, and its seat among the others. `closing` ends every wait."""

    def __init__(
        self,
        config: EngineConfig,
        key: str,
        num_front_ends: int,
        command: Sequence[str] | None,
        closing: threading.Event,
    ) -> None:
        """Takes a seat, and starts the engine if it is the first. See EngineClient.connect.

        Raises:
            EngineError: the engine cannot be started.
        """
        self._config = config
        self._seated = time.monotonic()  # the engine loads from then on, though nobody may wait for it yet
        self._starter = EngineStarter(config, command)
        self._closing = closing
        # the engine process, if this front end owns it
        self._engine: subprocess.Popen[bytes] | InheritedEngine | None = None
        self._life_line: int | None = None  # the newest engine lives while any front end holds one
        self._election = Election(key, num_front_ends)
        self._seat = self._election.take_seat(self._start)
        self._incarnation = self._seat.first
        # the front end that owns the engine, if it is another one; known after the first look
        self._owner: ProcessId | None = None
        self._next_look = 0.0
        self._next_touch = time.monotonic() + _FRESHEN_SECONDS
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._queue: NDArray[np.int64] | None = None  # of the newest engine, in memory that it shares
        self._load_seconds = 0.0  # how long the first load took, or what was seen of it
        self._begin_seconds = 0.0  # until the slowest engine had begun to load, or what was seen of it
        self._restarts: deque[float] = deque()  # when the last ones were

    @property
    def owner(self) -> bool:
        """This front end started the engine, or inherited it."""
        return self._engine is not None

    @property
    def front_end(self) -> int:
        return self._seat.front_end

    @property
    def engine_pid(self) -> int:
        return self._incarnation.engine.pid

    @property
    def engine_folder(self) -> Path:
        """Of the newest engine."""
        return self._seat.folder_of(self._incarnation)

    @property
    def num_waiting(self) -> int:
        """Requests that wait in the newest engine, of all front ends, as of its last step."""
        queue = self._queue
        return 0 if queue is None else int(queue[0])

    @property
    def num_running(self) -> int:
        """Requests that run in the newest engine, as of its last step."""
        queue = self._queue
        return 0 if queue is None else int(queue[1])

    # ---- the first engine, and the next ones

    def meet_first(self) -> tuple[EngineLink, Ready]:
        """See `_meet`."""
        met = self._meet(lambda: (math.inf, math.inf))
        self._load_seconds = time.monotonic() - self._seated
        return met

    def next_engine(self) -> bool:
        """Started if this front end owns the engine, awaited if not; then `meet_next`. False: there will be none.

        Raises:
            EngineError: it cannot be started.
        """
        following = self._restart() if self._engine is not None else self._await()
        if following is not None:
            self._incarnation = following
        return following is not None

    def meet_next(self) -> tuple[EngineLink, Ready]:
        """See `_meet`."""
        return self._meet(self._retry_policy)

    def _retry_policy(self) -> tuple[float, float]:
        """Seconds until an engine that replaces another must be ready, and until it must have begun to load. Only who
        can do something about it loses patience.
        """
        hang_seconds = self._config.engine_hang_seconds
        if not self.owner:
            return math.inf, math.inf
        begin_seconds = max(_BEGIN_SECONDS, _LOAD_PATIENCE * self._begin_seconds)
        return max(hang_seconds, _LOAD_PATIENCE * self._load_seconds) if hang_seconds > 0 else math.inf, begin_seconds

    def _meet(self, retry_policy: Callable[[], tuple[float, float]]) -> tuple[EngineLink, Ready]:
        """Says hello and waits as long as the engine's process lives, or patience lasts: a large model takes minutes to
        load.

        Raises:
            EngineError: why it cannot serve; or this front end is closing.
        """
        if not self.owner:
            self._hold_on(self.engine_folder)
        link = EngineLink(self._context, self.engine_folder, self.front_end)
        started, begun = time.monotonic(), False
        try:
            while not self._closing.is_set():
                message = link.next_message()
                if not begun and (self.engine_folder / ENGINE_SOCKET).exists():
                    begun, self._begin_seconds = True, max(self._begin_seconds, time.monotonic() - started)
                if isinstance(message, Ready):
                    self._queue = open_queue(self.engine_folder / QUEUE_FILE)
                    self._starter.note_ready()
                    return link, message
                if isinstance(message, Failed):
                    raise EngineError(message.message)
                if message is None and not self.engine_runs() and (message := link.next_message(wait=False)) is None:
                    raise EngineError(
                        f"the engine process ended {self.exit_words()} before it was ready; its log lines say why"
                    )
                self.inherit()
                ready_seconds, begin_seconds = retry_policy()
                if message is None and time.monotonic() > started + ready_seconds:
                    raise EngineError(f"it was not ready after {ready_seconds:.0f} s")
                if message is None and not begun and time.monotonic() > started + begin_seconds:
                    raise EngineError(f"it had not begun to load after {begin_seconds:.0f} s")
            raise EngineError("the model is being unloaded")
        except BaseException:
            link.close()
            raise

    def _await(self) -> Incarnation | None:
        while not self._closing.wait(0.05):
            try:
                outlook = self._election.look(self._seat)
            except EngineError as error:
                log.error("error: %s", error)
                return None
            if outlook is None:
                return None
            if outlook.incarnation.number > self._incarnation.number:
                return outlook.incarnation
            if self._inherits(outlook):
                return self._restart()
        return None

    def _restart(self) -> Incarnation | None:
        assert self._engine is not None
        self._engine.kill()
        wait_for_exit(self._engine)
        if not wait_for_ranks(self.engine_folder, _RANKS_SECONDS):
            log.warning(
                "ranks of the engine before did not end within %.0f s: their GPUs may lack memory", _RANKS_SECONDS
            )
        now = time.monotonic()
        if self._num_recent_restarts() >= self._config.max_engine_restarts:
            self._starter.close()
            return None
        num_quick = sum(now - restart < _QUICK_DEATH_SECONDS for restart in self._restarts)
        if num_quick and self._closing.wait(min(0.1 * 2**num_quick, _LONGEST_PAUSE_SECONDS)):
            return None
        self._restarts.append(time.monotonic())
        return self._election.restart(self._seat, self._start)

    def _num_recent_restarts(self) -> int:
        while self._restarts and time.monotonic() - self._restarts[0] > _RESTART_WINDOW_SECONDS:
            self._restarts.popleft()
        return len(self._restarts)

    def restart_words(self) -> str:
        """What follows the death of the engine that this front end owns."""
        count, most, minutes = (
            self._num_recent_restarts(),
            self._config.max_engine_restarts,
            _RESTART_WINDOW_SECONDS / 60,
        )
        if count >= most:
            return f"no restart is left, there were {count} within {minutes:.0f} minutes (max_engine_restarts {most})"
        return f"restart {count + 1} of at most {most} within {minutes:.0f} minutes (max_engine_restarts)"

    def _start(self, folder: Path) -> int:
        create_life_line(folder)
        self._hold_on(folder)
        try:
            self._engine = self._starter.start(folder)
        except BaseException:
            self._let_go()
            raise
        return self._engine.pid

    def _hold_on(self, folder: Path) -> None:
        """Lets go of the engine before, if there was one."""
        line = hold_life_line(folder)
        self._let_go()
        self._life_line = line

    def _let_go(self) -> None:
        if self._life_line is not None:
            os.close(self._life_line)
            self._life_line = None

    def stand_by(self) -> None:
        """Keeps a process ready to take this front end's engine's place. To be called often, by the thread that
        restarts it.
        """
        if self._engine is not None:
            self._starter.stand_by(self._seat.folder_after(self._incarnation))

    # ---- another owner

    def inherit(self) -> bool:
        """Takes the engine over if its owner has died and nobody has done so yet; True: it was taken over just now. To
        be called often.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _OWNER_SECONDS
        if now > self._next_touch and self.owner:
            self._next_touch = now + _FRESHEN_SECONDS
            self._election.keep_fresh(self._seat)
        if self.owner or (self._owner is not None and self._owner.alive):
            return False
        try:
            outlook = self._election.look(self._seat)
        except EngineError as error:
            log.warning("%s", error)
            return False
        return outlook is not None and outlook.incarnation == self._incarnation and self._inherits(outlook)

    def _inherits(self, outlook: Outlook) -> bool:
        """True: this front end owns the engine from now on."""
        if outlook.owner != self.front_end:
            self._owner = outlook.owner_process
            return False
        log.warning("the front end that owned the engine died; front end %d owns it now", self.front_end)
        self._engine = InheritedEngine(self._incarnation.engine)
        self._restarts = deque(outlook.restarts)  # max_engine_restarts is the engine's, whoever restarts it
        self._starter.note_ready()
        return True

    # ---- is it alive, and what did it leave

    def engine_runs(self) -> bool:
        if self._engine is not None:
            return self._engine.poll() is None
        return self._incarnation.engine.alive

    def exit_words(self) -> str:
        """How its process ended."""
        if self._engine is None or self._engine.returncode is None:
            return "by itself"
        code = self._engine.returncode
        return f"by {signal_name(-code)}" if code < 0 else f"with status {code}"

    def last_running(self) -> tuple[set[int], int | None]:
        """(request ids that ran when the engine died, the suspect among them)."""
        running, suspect = _read(self.engine_folder / RUNNING_FILE), _read(self.engine_folder / SUSPECT_FILE)
        return set(np.frombuffer(running[: len(running) // 8 * 8], np.int64).tolist()), int(
            suspect
        ) if suspect.isdigit() else None

    # ---- the end

    def end(self, reason: str = "") -> str | None:
        """Nobody joins any more. The reason that another front end has given before, or None if none has."""
        try:
            return self._election.end(self._seat, reason)
        except EngineError as error:  # whoever comes finds the engine dead
            log.warning("%s", error)
            return None

    def tells_loss(self) -> bool:
        """See EngineClient.tells_loss. Also True if nobody can know who has asked: better twice than never."""
        try:
            return self._election.tells_loss(self._seat)
        except EngineError as error:
            log.warning("%s", error)
            return True

    def close(self, link: EngineLink | None) -> None:
        """Says goodbye through `link`, if there is an engine at the moment; its owner ends it and waits for its exit,
        at most 10 s.
        """
        self._starter.close()
        if self._engine is not None:
            self.end()
        if link is not None:
            link.send(Goodbye(self.front_end))
            if self._engine is not None:
                link.send(Shutdown(_PATIENCE_SECONDS))
            link.close(_LINGER_MS if self.engine_runs() else 0)
        elif self._engine is not None:
            self._engine.kill()  # it was still loading
        if self._engine is not None:
            wait_for_exit(self._engine)
        self._let_go()
        self._context.term()
        with suppress(EngineError):  # its folder is lost, or will be swept
            self._election.leave(self._seat)


def signal_name(number: int) -> str:
    """`SIGKILL`; "signal 40" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def open_queue(path: Path) -> NDArray[np.int64] | None:
    """int64 [2], in memory that the engine shares; None if there is none."""
    try:
        return np.memmap(path, np.int64, "r", shape=2)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
