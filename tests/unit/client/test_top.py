"""`paged top` without an engine: rates from snapshots, the map in every size, the frame, and the page's door."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from paged_backend.engine.snapshot import CACHED, FREE, SHARED, LiveRequest, Snapshot
from paged_client.top.engines import (
    Choice,
    NoEngineError,
    RunningEngine,
    View,
)
from paged_client.top.history import History, hit_rate_since_start, right_drafts, utilisation
from paged_client.top.page_map import colour_of, draw, zoomed
from paged_client.top.view import Room, frame, sparkline
from paged_client.top.web import PageServer, event_of, page_server

CELLS = np.array([FREE, CACHED, SHARED, 3, 4, 3], np.uint16)


def snapshot(time: float = 10.0, cells: np.ndarray = CELLS, **changes: object) -> Snapshot:
    base = Snapshot(
        model="a [b]model[/b]",
        time=time,
        page_size=16,
        num_pages=len(cells),
        pages_per_cell=1,
        cells=cells.astype("<u2").tobytes(),
        pages_free=1,
        pages_held=4,
        pages_shared=1,
        pages_cached=1,
        live_tokens=48,
        num_running=2,
        num_waiting=1,
        num_preemptions=7,
        prefix_queries=1000,
        prefix_hits=250,
        num_tokens=0,
        requests=(
            LiveRequest(41, 3, 20, 16, 25, 3, 1.5),
            LiveRequest(42, 4, 9, 0, 10, 2, 0.5),
            LiveRequest(43, 0, 30, 0, 30, 0, 0.1),
        ),
        first_token_seconds=(),
        step_seconds=(),
    )
    return msgspec.structs.replace(base, **changes)


def shown(
    view: View, latest: Snapshot | None, history: History, width: int = 100, height: int = 40, coloured: bool = False
) -> str:
    console = Console(
        width=width,
        height=height,
        color_system="truecolor" if coloured else None,
        force_terminal=coloured,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(frame(view, latest, history, Room(width, height, coloured)))
    return capture.get()


def test_rates_come_from_differences() -> None:
    history = History()
    history.add(snapshot(10.0))
    assert (history.tokens_per_second, history.first_token_ms, history.inter_token_ms, history.hit_rate) == (
        0.0,
        None,
        None,
        None,
    )
    history.add(
        snapshot(
            10.5,
            num_tokens=50,
            first_token_seconds=(0.1, 0.3),
            step_seconds=(0.01, 0.03),
            prefix_queries=1100,
            prefix_hits=350,
        )
    )
    history.add(snapshot(11.0, num_tokens=100, prefix_queries=1100, prefix_hits=350))
    assert history.tokens_per_second == 100
    assert history.first_token_ms == pytest.approx(200)
    assert history.inter_token_ms == pytest.approx(20)
    assert history.hit_rate == 1.0
    assert [moment.tokens_per_second for moment in history.moments] == [100, 100]
    assert [moment.first_token_ms is None for moment in history.moments] == [False, True]
    assert (hit_rate_since_start(snapshot()), utilisation(snapshot())) == (0.25, 0.75)
    assert utilisation(snapshot(pages_held=0)) is None


def test_another_engine_begins_another_history() -> None:
    history = History()
    history.add(snapshot(10.0, num_tokens=500))
    history.add(snapshot(10.5, num_tokens=600))
    history.add(snapshot(11.0, num_tokens=3))
    assert (len(history.moments), history.tokens_per_second) == (0, 0.0)


@pytest.mark.parametrize("lines", [1, 3])
def test_a_curve_fills_its_lines_at_the_highest_and_is_blank_where_nothing_was(lines: int) -> None:
    rows = sparkline([4.0, None, 8.0, 0.0], 6, lines).split("\n")
    assert len(rows) == lines
    assert {len(row) for row in rows} == {6}
    columns = ["".join(row[index] for row in rows).strip() for index in range(6)]
    assert columns == ["", "", {1: "▄", 3: "▄█"}[lines], "", "█" * lines, "▁"]
    assert sparkline([], 4, 1) == "    "


@given(st.integers(1, 5000), st.integers(4, 120), st.integers(1, 30), st.booleans())
def test_the_map_fits_into_its_place_and_shows_every_page(
    num_cells: int, width: int, height: int, coloured: bool
) -> None:
    drawn = draw(np.full(num_cells, 5, np.uint16), 1, width, height, coloured)
    lines = drawn.text.plain.split("\n")
    assert len(lines) <= height
    assert max(len(line) for line in lines) <= width
    marks = sum(2 if mark == "█" else mark in "■▀▄c" for mark in drawn.text.plain)
    assert marks * drawn.pages_per_cell >= num_cells
    assert (marks - 1) * drawn.pages_per_cell < num_cells + drawn.pages_per_cell


def test_the_map_begins_with_the_part_that_was_used() -> None:
    cells = np.zeros(32_768, np.uint16)
    assert [len(zoomed(cells, used, 100, 10)) for used in (0, 1, 500, 501, 1001, 20_000)] == [
        500,
        500,
        500,
        1000,
        2000,
        32_000,
    ]
    assert len(zoomed(cells, 32_768, 100, 10)) == len(cells)
    assert len(zoomed(cells[:300], 7, 100, 10)) == 300


def test_a_first_frame_draws_a_page_a_cell_and_says_what_it_leaves_out() -> None:
    cells = np.zeros(32_768, np.uint16)
    cells[:9] = 3
    history, latest = History(), snapshot(cells=cells)
    history.add(latest)
    text = shown(View(None, latest), latest, history, 100, 40)
    assert "a a a a a a a a a ·" in text
    hidden = re.search(r"([\d,]+) free not drawn", text)
    assert hidden is not None and 30_000 < int(hidden[1].replace(",", "")) < 32_768
    narrow = shown(View(None, latest), latest, history, 80, 24)
    assert re.search(r"a held 4  · free 1  □ cached 1  ◆ shared 1  [\d,]+ free not drawn", narrow)
    console = Console(width=100, height=40, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(frame(View(None, latest), latest, history, Room(100, 40, False, whole=True)))
    assert "not drawn" not in capture.get() and "a cell is " in capture.get()


def test_without_colour_every_state_and_request_has_a_sign_of_its_own() -> None:
    assert draw(CELLS, 1, 12, 1, coloured=False).text.plain == "· □ ◆ a b a "
    assert draw(CELLS, 1, 3, 2, coloured=False).text.plain == "·□◆\naba"


def test_neighbouring_requests_have_colours_far_apart() -> None:
    def distance(one: str, other: str) -> int:
        return sum(abs(int(one[i : i + 2], 16) - int(other[i : i + 2], 16)) for i in (1, 3, 5))

    colours = [colour_of(number) for number in range(3, 40)]
    assert min(distance(one, other) for one, other in pairwise(colours)) > 100
    assert len(set(colours)) == len(colours)


def test_a_frame_tells_everything() -> None:
    history, latest = History(), snapshot(11.0, num_tokens=90, first_token_seconds=(0.0421,), step_seconds=(0.0065,))
    history.add(snapshot(10.0))
    history.add(latest)
    text = shown(View(RunningEngine(77, Path("/nowhere")), latest), latest, history)
    for words in (
        "a [b]model[/b]  6 pages of 16 tokens  pid 77",
        "· □ ◆ a b a",
        "held 4 (a letter a request)  · free 1  □ cached 1  ◆ shared 1",
        "tokens/s 90",
        "first token 42 ms",
        "between tokens 6.5 ms",
        "utilisation 75 %   running 2   waiting 1   preemptions 7   prefix hits – (25 % since start)",
    ):
        assert words in text, text
    rows = [line.split() for line in text.splitlines()[-3:]]
    assert rows == [
        ["a", "41", "20", "16", "5", "3", "1.5", "s"],
        ["b", "42", "9", "0", "1", "2", "0.5", "s"],
        ["waiting", "43", "30", "0", "0", "0", "0.1", "s"],
    ]


def test_what_was_guessed_right_is_told_where_anything_was() -> None:
    history, latest = History(), snapshot(11.0, drafts_proposed=50, drafts_accepted=20, drafts_checked=16)
    history.add(latest)
    text = shown(View(None, latest), latest, history, 140)
    assert "drafts right 40 % (1.2 a step)" in text
    assert right_drafts(latest) == (0.4, 1.25)
    assert right_drafts(snapshot()) is None


@settings(deadline=None)
@given(st.integers(30, 200), st.integers(18, 70), st.integers(0, 300), st.integers(1, 30_000), st.booleans())
def test_a_frame_is_no_larger_than_the_terminal(
    width: int, height: int, num_requests: int, num_cells: int, coloured: bool
) -> None:
    requests = tuple(
        LiveRequest(arrival_index, 3 + arrival_index, 10, 0, 20, 2, 1.0) for arrival_index in range(num_requests)
    )
    latest = snapshot(
        cells=np.full(num_cells, 3, np.uint16), requests=requests, num_running=num_requests, num_waiting=0
    )
    text = shown(View(RunningEngine(77, Path("/nowhere")), latest), latest, History(), width, height, coloured)
    assert text.count("\n") <= height


def test_a_narrow_terminal_shows_every_fact() -> None:
    history, latest = History(), snapshot(11.0, prefix_queries=1100, prefix_hits=350)
    history.add(snapshot(10.0))
    history.add(latest)
    wide, narrow = (shown(View(None, latest), latest, history, width) for width in (100, 60))
    assert re.search(
        r" utilisation 75 %   running \d+   waiting \d+   preemptions \d+   prefix hits 100 % \(32 % since start\)\n",
        wide,
    )
    assert re.search(
        r" utilisation 75 %   running \d+   waiting \d+   preemptions \d+ *\n prefix hits 100 % \(32 % since "
        r"start\) *\n",
        narrow,
    )


def test_silence_and_a_lost_engine_are_said() -> None:
    latest = snapshot()
    assert "no news from the engine" in shown(View(RunningEngine(77, Path("/x")), None), latest, History())
    assert "the engine is gone" in shown(View(None, None, "the engine is gone"), latest, History())
    assert "waiting for the engine" in shown(View(None, None), None, History())


# ---- the page


@pytest.fixture
def server() -> Iterator[PageServer]:
    with page_server(Choice(2**22 + 1), 0) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()


def get(server: PageServer, path: str, host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request("GET", path, headers={"Host": host or f"localhost:{server.server_port}"})
    return connection.getresponse()


def test_the_page_needs_nothing_from_elsewhere(server: PageServer) -> None:
    answer = get(server, "/")
    page = answer.read().decode()
    assert answer.status == 200
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "NONCE" not in page
    assert "default-src 'none'" in (answer.getheader("Content-Security-Policy") or "")


def test_the_page_is_for_this_machine_only(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for path in ("/", "/events"):
        assert get(server, path, host=f"evil.example:{server.server_port}").status == 403
    assert get(server, "/../../etc/passwd").status == 404


def test_events_say_what_is_wrong(server: PageServer) -> None:
    answer = get(server, "/events")
    assert answer.getheader("Content-Type") == "text/event-stream"
    event = json.loads(answer.readline().removeprefix(b"data: "))
    assert (event["pid"], event["trouble"]) == (None, "process 4194305 has no engine here")


def test_an_event_has_the_snapshot_and_the_rates() -> None:
    history, engine = History(), RunningEngine(77, Path("/nowhere"))
    event_of(View(engine, snapshot(10.0)), history)
    event = json.loads(json.dumps(event_of(View(engine, snapshot(11.0, num_tokens=90)), history)))
    assert event["cells"] == "AAABAAIAAwAEAAMA"
    assert event["requests"][0] == {
        "arrival_index": 41,
        "number": 3,
        "num_prompt_tokens": 20,
        "num_cached_tokens": 16,
        "num_tokens": 25,
        "num_pages": 3,
        "age_seconds": 1.5,
    }
    assert (event["moments"], event["tokens_per_second"], event["utilisation"], event["pid"]) == (
        [[90.0, None, None]],
        90.0,
        0.75,
        77,
    )


def test_a_taken_port_is_one_sentence(server: PageServer) -> None:
    with pytest.raises(
        NoEngineError, match=f"port {server.server_port} on 127.0.0.1 cannot be used: .*choose another with --port"
    ):
        page_server(None, server.server_port)
