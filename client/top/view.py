"""One frame of `paged top` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.align import Align
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from paged_backend.engine.snapshot import CACHED, FREE, SHARED, LiveRequest, Snapshot
from paged_client.top.engines import View
from paged_client.top.history import History, hit_rate_since_start, right_drafts, utilisation
from paged_client.top.page_map import GLYPHS, HELD_GLYPH, draw, glyph_of, style_of, zoomed

_BARS = " ▁▂▃▄▅▆▇█"
_ACCENT = Style(color="#4c8dff")
_DIM = Style(dim=True)
_BOLD = Style(bold=True)
_FIXED_LINES = 10  # everything but the map's cells, the curves' lines and the table's rows
_FEWEST_ROWS = 3
_FRAME = 6  # columns of a panel's border beside its subtitle
_ROOM_FOR_TWO = 20  # lines of a terminal: then the facts may take a second one


@dataclass(frozen=True)
class Room:
    """What a frame may fill, and how."""

    width: int
    height: int
    coloured: bool
    whole: bool = False  # draw all of the pool, not only the part that was ever used


def frame(view: View, snapshot: Snapshot | None, history: History, room: Room) -> RenderableType:
    """snapshot: the newest there is, which may be older than `view`."""
    if snapshot is None:
        return Align.center(Text(f"\n{view.trouble or 'waiting for the engine …'}", style=_DIM))
    width, height, coloured = room.width, room.height, room.coloured
    curve_lines = 3 if height >= 34 else 1
    facts = _facts(snapshot, history, width, most_lines=2 if height >= _ROOM_FOR_TWO else 1)
    lines = height - _FIXED_LINES - facts.plain.count("\n") - curve_lines
    map_lines = max(4, lines - min(len(snapshot.requests), max(_FEWEST_ROWS, height // 3)))
    cells = np.frombuffer(snapshot.cells, "<u2")
    shown = cells if room.whole else zoomed(cells, history.num_used_cells, width - 4, map_lines)
    drawn = draw(shown, snapshot.pages_per_cell, width - 4, map_lines, coloured)
    rows = max(_FEWEST_ROWS, lines - drawn.text.plain.count("\n") - 1)
    hidden = (len(cells) - len(shown)) * snapshot.pages_per_cell
    return Group(
        Panel(
            drawn.text,
            title=_title(view, snapshot),
            title_align="left",
            subtitle=_legend(snapshot, drawn.pages_per_cell, hidden, room),
            subtitle_align="left",
            border_style=_DIM,
        ),
        _curves(history, width, curve_lines),
        facts,
        Text(),
        _requests(snapshot, rows, coloured),
    )


def sparkline(values: Sequence[float | None], width: int, lines: int) -> str:
    """The newest `width` values as bars of eighths of a line; a blank where there is none. The highest fills all
    lines.
    """
    shown = values[-width:]
    top = max((value for value in shown if value is not None), default=0.0) or 1.0
    eighths = [0 if value is None else max(1, round(8 * lines * value / top)) for value in shown]
    rows = [
        "".join(_BARS[min(8, max(0, height - 8 * line))] for height in eighths).rjust(width) for line in range(lines)
    ]
    return "\n".join(reversed(rows))


def _title(view: View, snapshot: Snapshot) -> Text:
    state = view.trouble.split("\n")[0] or ("" if view.snapshot else "no news from the engine: a long step?")
    name = f"{view.engine.model_name}: " if view.engine is not None and view.engine.model_name else ""
    if view.engine is not None and view.engine.replica is not None:
        name += f"replica {view.engine.replica}, "
    title = Text.assemble(
        ("paged top", _BOLD), f"  {name}{snapshot.model}  {snapshot.num_pages:,} pages of {snapshot.page_size} tokens"
    )
    if view.engine is not None:
        title.append(f"  pid {view.engine.pid}", _DIM)
    if state:
        title.append(f"  {state}", Style(color="red"))
    return title


def _legend(snapshot: Snapshot, pages_per_cell: int, num_hidden: int, room: Room) -> Text:
    """What the signs mean and how many there are; what a colour is, only where there is room for it."""
    explained = _legend_of(
        snapshot,
        pages_per_cell,
        num_hidden,
        room.coloured,
        " (a colour a request)" if room.coloured else " (a letter a request)",
    )
    return (
        explained
        if explained.cell_len <= room.width - _FRAME
        else _legend_of(snapshot, pages_per_cell, num_hidden, room.coloured, "")
    )


def _legend_of(snapshot: Snapshot, pages_per_cell: int, num_hidden: int, coloured: bool, explanation: str) -> Text:
    counts = (
        (FREE, "free", snapshot.pages_free),
        (CACHED, "cached", snapshot.pages_cached),
        (SHARED, "shared", snapshot.pages_shared),
    )
    legend = Text.assemble(f"{HELD_GLYPH if coloured else 'a'} held ", (f"{snapshot.pages_held:,}", _BOLD), explanation)
    for code, name, count in counts:
        legend.append("  ").append(GLYPHS[code], style_of(code)).append(f" {name} ").append(f"{count:,}", _BOLD)
    if pages_per_cell > 1:
        legend.append(f"  a cell is {pages_per_cell} pages", _DIM)
    if num_hidden > 0:
        legend.append(f"  {num_hidden:,} free not drawn", _DIM)
    return legend


def _curves(history: History, width: int, lines: int) -> Table:
    moments = list(history.moments)
    curves: tuple[tuple[str, str, Sequence[float | None]], ...] = (
        ("tokens/s", f"{history.tokens_per_second:,.0f}", [moment.tokens_per_second for moment in moments]),
        ("first token", _milliseconds(history.first_token_ms), [moment.first_token_ms for moment in moments]),
        ("between tokens", _milliseconds(history.inter_token_ms), [moment.inter_token_ms for moment in moments]),
    )
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in curves:
        grid.add_column(ratio=1)
    inside = width // 3 - 5
    panels = []
    for name, value, values in curves:
        title = Text.assemble(f"{name} ", (value, _BOLD))
        panels.append(
            Panel(
                Text(sparkline(values, inside, lines), _ACCENT, no_wrap=True),
                title=title,
                title_align="left",
                border_style=_DIM,
            )
        )
    grid.add_row(*panels)
    return grid


def _facts(snapshot: Snapshot, history: History, width: int, most_lines: int) -> Text:
    """A line, or more where one has no room for all."""
    facts = [
        ("utilisation", _percent(utilisation(snapshot))),
        ("running", f"{snapshot.num_running}"),
        ("waiting", f"{snapshot.num_waiting}"),
        ("preemptions", f"{snapshot.num_preemptions:,}"),
        ("prefix hits", f"{_percent(history.hit_rate)} ({_percent(hit_rate_since_start(snapshot))} since start)"),
    ]
    if (drafts := right_drafts(snapshot)) is not None:
        facts.append(("drafts right", f"{_percent(drafts[0])} ({drafts[1]:.1f} a step)"))
    text, last_line = Text(no_wrap=True, overflow="ellipsis"), 0
    for name, value in facts:
        needed = len(name) + len(value) + 4
        if text and last_line + needed > width and text.plain.count("\n") < most_lines - 1:
            text.append("\n")
            last_line = 0
        text.append("   " if last_line else " ").append(f"{name} ", _DIM).append(value, _BOLD)
        last_line += needed
    return text


def _requests(snapshot: Snapshot, num_rows: int, coloured: bool) -> RenderableType:
    if not snapshot.requests:
        return Text(" no requests", style=_DIM)
    table = Table(box=None, pad_edge=True, header_style=_DIM)
    for name in ("request", "prompt", "cached", "answer", "pages", "age"):
        table.add_column(name, justify="right", min_width=8)
    hidden = snapshot.num_running + snapshot.num_waiting - num_rows
    shown = snapshot.requests[: num_rows if hidden <= 0 else num_rows - 1]
    for request in shown:
        table.add_row(*_row(request, coloured))
    if hidden > 0:
        table.add_row(Text(f"and {snapshot.num_running + snapshot.num_waiting - len(shown)} more", _DIM))
    return table


def _row(request: LiveRequest, coloured: bool) -> list[Text | str]:
    if request.number:
        mark = (glyph_of(request.number, coloured), style_of(request.number))
        name = Text.assemble(mark, f" {request.arrival_index}")
    else:
        name = Text(f"waiting {request.arrival_index}", _DIM)
    numbers = (
        request.num_prompt_tokens,
        request.num_cached_tokens,
        request.num_tokens - request.num_prompt_tokens,
        request.num_pages,
    )
    return [name, *(f"{number:,}" for number in numbers), f"{request.age_seconds:.1f} s"]


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"
