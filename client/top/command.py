"""`paged top`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from paged_backend.snapshot import Snapshot
from paged_client.top.engines import NoEngineError, View, choose_engine, follow
from paged_client.top.history import History
from paged_client.top.view import frame

_ONCE_SNAPSHOTS = 5  # enough for rates


def top(
    pid: Annotated[int | None, typer.Option(metavar="PID", help="Which engine, if several run: its process id, or its tritonserver's.")] = None,
    web: Annotated[bool, typer.Option("--web", help="Show it in a browser: serve a page on this machine only.")] = False,
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Of the page; 0: a free one.")] = 8003,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and leave.")] = False,
) -> None:
    """Watch a running engine: the page pool as a map, speed, requests.

    Works on the machine (or in the container) where the server runs, whoever started it, as the server's user or root.
    The engine publishes while somebody watches, and never a word of a prompt or an answer. Ctrl-C leaves.
    """
    try:
        choose_engine(pid)
        if web:
            from paged_client.top.web import serve_page

            serve_page(pid, port)
        else:
            _show(pid, once or not sys.stdout.isatty())
    except NoEngineError as error:
        print(f"paged: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit() from None


def _show(pid: int | None, once: bool) -> None:
    console = Console(highlight=False)
    screen = _Screen(console)
    views = follow(pid)
    try:
        if once:
            for _ in range(_ONCE_SNAPSHOTS):
                screen.take(next(views))
            console.print(screen.frame())
            return
        with Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
            for view in views:
                screen.take(view)
                live.update(screen.frame(), refresh=True)
    finally:
        views.close()


class _Screen:
    """What the terminal shows: the newest snapshot and the minute before it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._history = History()
        self._snapshot: Snapshot | None = None
        self._view = View(None, None)

    def take(self, view: View) -> None:
        self._view = view
        if view.snapshot is not None:
            self._snapshot = view.snapshot
            self._history.add(view.snapshot)

    def frame(self) -> RenderableType:
        width, height = self._console.size
        coloured = self._console.color_system is not None and not self._console.no_color
        return frame(self._view, self._snapshot, self._history, width, height, coloured)
