"""`paged top`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from paged_backend.engine.snapshot import Snapshot
from paged_client.top.engines import Choice, NoEngineError, View, choose_engine, follow, port_of
from paged_client.top.history import History
from paged_client.top.view import Room, frame

_ONCE_SNAPSHOTS = 5  # enough for rates


def top(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME", help="Which engine, if several run: what its server calls the model."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", "-u", metavar="URL", help="Which engine: any HOST:PORT of its server, on this machine."),
    ] = None,
    pid: Annotated[
        int | None, typer.Option(metavar="PID", help="Which engine: its process id, or its tritonserver's.")
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Show it in a browser: serve a page on this machine only.")
    ] = False,
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Of the page; 0: a free one.")] = 8003,
    whole: Annotated[
        bool, typer.Option("--whole", help="Draw the whole pool, also pages that have not been used yet.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and leave.")] = False,
) -> None:
    """Watch a running engine: the page pool as a map, speed, requests.

    Works on the machine (or in the container) where the server runs, whoever started it, as the server's user or root.
    If several engines run, it lists them. The engine publishes while somebody watches, and never a word of a prompt or
    an answer. Ctrl-C leaves.
    """
    try:
        choice = Choice(pid, None if url is None else port_of(url), model)
        choose_engine(choice)
        if web:
            from paged_client.top.web import serve_page

            serve_page(choice, port)
        else:
            _show(choice, whole, once or not sys.stdout.isatty())
    except NoEngineError as error:
        print(f"paged: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit() from None


def _show(choice: Choice, whole: bool, once: bool) -> None:
    console = Console(highlight=False)
    screen = _Screen(console, whole)
    views = follow(choice)
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

    def __init__(self, console: Console, whole: bool) -> None:
        self._console = console
        self._whole = whole
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
        return frame(self._view, self._snapshot, self._history, Room(width, height, coloured, self._whole))
