"""The pool as a picture in a terminal: a cell a page, or a few pages a cell if there are more pages than room."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
from rich.style import Style
from rich.text import Text

from paged_backend.engine.snapshot import CACHED, FIRST_REQUEST, FREE, SHARED, Cells

_Item = TypeVar("_Item")
_GOLDEN = 0.618033988749895  # consecutive hues lie far apart
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GREY = "#777777"
GLYPHS = {FREE: "·", CACHED: "□", SHARED: "◆"}
HELD_GLYPH = "■"


@dataclass(frozen=True)
class PageMap:
    text: Text
    pages_per_cell: int


def zoomed(cells: Cells, num_used: int, width: int, height: int) -> Cells:
    """The beginning of the map: so much that a cell a page fills the room, and twice that as often as needed to show
    the first `num_used` cells. A pool hands out its lowest pages first, so the rest is free.
    """
    shown = max(1, width // 2 * height)
    while shown < num_used:
        shown *= 2
    return cells[:shown]


def colour_of(number: int) -> str:
    """A request's colour, readable on dark and on light: "#rrggbb"."""
    hue = (number - FIRST_REQUEST) * _GOLDEN % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, 0.55, 0.7)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def glyph_of(code: int, coloured: bool) -> str:
    if code < FIRST_REQUEST:
        return GLYPHS[code]
    return HELD_GLYPH if coloured else _LETTERS[(code - FIRST_REQUEST) % len(_LETTERS)]


def style_of(code: int) -> Style:
    if code == FREE:
        return Style(dim=True)
    if code == CACHED:
        return Style(color=_GREY)
    return Style(bold=True) if code == SHARED else Style(color=colour_of(code))


def draw(cells: Cells, pages_per_cell: int, width: int, height: int, coloured: bool) -> PageMap:
    """At most `height` lines of at most `width` characters. coloured: False uses letters for requests instead."""
    if len(cells) <= width // 2 * height:
        return PageMap(_draw_glyphs(cells, width // 2, " ", coloured), pages_per_cell)
    room = width * height * (2 if coloured else 1)
    group = -(-len(cells) // room)
    if group > 1:
        cells = np.pad(cells, (0, -len(cells) % group)).reshape(-1, group).max(axis=1)
    drawn = _draw_half_blocks(cells, width) if coloured else _draw_glyphs(cells, width, "", coloured)
    return PageMap(drawn, pages_per_cell * group)


def _draw_glyphs(cells: Cells, columns: int, gap: str, coloured: bool) -> Text:
    text = Text(no_wrap=True)
    for start in range(0, len(cells), columns):
        if start:
            text.append("\n")
        for code, count in _runs(cells[start : start + columns].tolist()):
            text.append((glyph_of(code, coloured) + gap) * count, style_of(code))
    return text


def _draw_half_blocks(cells: Cells, columns: int) -> Text:
    """Two rows of cells a line: the upper one is the character's colour, the lower one its background."""
    padded = np.pad(cells, (0, -len(cells) % (2 * columns))).reshape(-1, 2, columns)
    text = Text(no_wrap=True)
    for index, (upper, lower) in enumerate(padded.tolist()):
        if index:
            text.append("\n")
        for (above, below), count in _runs(list(zip(upper, lower, strict=True))):
            glyph, style = _half_block(above, below)
            text.append(glyph * count, style)
    return text


def _half_block(above: int, below: int) -> tuple[str, Style]:
    if above == below:
        return ("·", Style(dim=True)) if above == FREE else ("█", Style(color=_ink(above)))
    if above == FREE:
        return "▄", Style(color=_ink(below))
    if below == FREE:
        return "▀", Style(color=_ink(above))
    if below == SHARED:  # drawn in the terminal's own text colour, which cannot be a background
        return "▄", Style(color=_ink(below), bgcolor=_ink(above))
    return "▀", Style(color=_ink(above), bgcolor=_ink(below))


def _ink(code: int) -> str | None:
    if code == SHARED:
        return None
    return _GREY if code == CACHED else colour_of(code)


def _runs(items: list[_Item]) -> Iterator[tuple[_Item, int]]:
    """Equal neighbours together: (item, how many)."""
    return ((item, len(list(equal))) for item, equal in groupby(items))
