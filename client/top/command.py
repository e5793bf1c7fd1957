"""`paged top`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from paged_backend.engine.snapshot import Snapshot
from paged_client.ctrl_c import CtrlC
from paged_client.top.engines import Choice, NoEngineError, View, choices_of_each, choose_engine, follow, port_of
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
    replica: Annotated[
        int | None,
        typer.Option("--replica", "-r", metavar="N", min=0, help="Which of a model's replicas; without it, each."),
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
    If several engines run, it lists them; of a model with replicas it shows each. The engine publishes while somebody
    watches, and never a word of a prompt or an answer. Ctrl-C leaves.
    """
    try:
        choices = choices_of_each(Choice(pid, None if url is None else port_of(url), model, replica))
        for choice in choices:
            choose_engine(choice)
        if web:
            from paged_client.top.web import serve_page

            serve_page(choices[0], port)
        else:
            _show(choices, whole, once or not sys.stdout.isatty())
    except NoEngineError as error:
        print(f"paged: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit() from None


def _show(choices: Sequence[Choice], whole: bool, once: bool) -> None:
    """A frame for each, one below the other."""
    console = Console(highlight=False)
    screens = [_Screen(console, whole, len(choices)) for _ in choices]
    followed = [follow(choice) for choice in choices]

    def all_frames() -> RenderableType:
        for screen, views in zip(screens, followed, strict=True):
            screen.take(next(views))
        return Group(*(screen.frame() for screen in screens))

    try:
        if once:
            for _ in range(_ONCE_SNAPSHOTS):
                frames = all_frames()
            console.print(frames)
            return
        # an exception in the middle of drawing would leave the terminal on the other screen
        with CtrlC() as ctrl_c, Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
            while True:
                with ctrl_c.raises():
                    frames = all_frames()
                live.update(frames, refresh=True)
    finally:
        for views in followed:
            views.close()


class _Screen:
    """What the terminal shows: the newest snapshot and the minute before it."""

    def __init__(self, console: Console, whole: bool, num_screens: int) -> None:
        """num_screens: that share the terminal's lines."""
        self._console = console
        self._num_screens = num_screens
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
        return frame(
            self._view, self._snapshot, self._history, Room(width, height // self._num_screens, coloured, self._whole)
        )
