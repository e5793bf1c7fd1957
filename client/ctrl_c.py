"""Ctrl-C, heard at the places that wait for it.

By itself Python raises KeyboardInterrupt in the main thread wherever that happens to be. Inside a library's lock, queue
or buffer this breaks what everything after it needs: rich's console, interrupted while it ends a print, never shows
anything again; a queue's lock stays taken, and the thread that fills the queue waits for ever. In a `__del__` or a
weak reference's callback Python drops the exception, and the Ctrl-C is lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn


class CtrlC:
    """A context manager. Within it, a Ctrl-C outside `calls` and `raises` is kept for the next of them; if another
    comes before that, KeyboardInterrupt is raised at once, so that a program that hangs can be left.

    with CtrlC() as ctrl_c:
        with ctrl_c.raises():
            line = input()
        with ctrl_c.calls(stream.stop):
            for delta in stream:
                ...

    Changes nothing outside the main thread, or where SIGINT does not raise KeyboardInterrupt (nohup, a program that
    deals with SIGINT itself): Ctrl-C then does what it did before. At its end Python's own way is back.

    Raises:
        KeyboardInterrupt: at its end, for a Ctrl-C that was kept.
    """

    def __init__(self) -> None:
        self._installed = False
        self._kept = False
        self._listener: Callable[[], object] | None = None  # of the next Ctrl-C only

    def __enter__(self) -> CtrlC:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._installed = True
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False
        if self._kept and kind is None:
            raise KeyboardInterrupt

    @contextmanager
    def calls(self, stop: Callable[[], None]) -> Iterator[None]:
        """The first Ctrl-C calls `stop`, in the middle of whatever the main thread does: it must not raise, and wait
        for no lock. A second one raises KeyboardInterrupt.
        """

        def first() -> None:
            self._listener = self._interrupt
            stop()

        with self._heard_by(first):
            yield

    @contextmanager
    def raises(self) -> Iterator[None]:
        """Ctrl-C raises KeyboardInterrupt, also one that was kept. What runs here may swallow that: then the next is
        kept, and the one after it raises again.
        """
        with self._heard_by(self._interrupt):
            yield

    @contextmanager
    def _heard_by(self, listener: Callable[[], object]) -> Iterator[None]:
        self._listener = listener
        try:
            if self._kept:
                self._hear()
            yield
        finally:
            self._listener = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._listener is None and not self._kept:
            self._kept = True
        else:
            self._hear()

    def _hear(self) -> None:
        listener, self._listener = self._listener, None
        self._kept = False
        (listener or self._interrupt)()

    def _interrupt(self) -> NoReturn:
        raise KeyboardInterrupt
