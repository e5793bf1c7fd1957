"""Which of tritonserver's lines are for the operator, and what a failure is called."""

from __future__ import annotations

import time

import pytest

from paged_backend.server.log import ServerLog

NOT_LOADED = (
    "E1122 21:19:28.817392 5897 model.cc:642] \"failed to load 'paged_llm' version 1: Internal: RuntimeError: no "
    'room\\n\\nAt:\\n  model.py(9)\\n"'
)
BUSY = (
    'E1122 21:19:31.811503 5990 main.cc:257] "failed to start HTTP service: Unavailable - Socket '
    "'127.0.0.1:8000' already in use \""
)
CREATING = "error: creating server: Internal - failed to load all models"
NOISE = 'E1122 21:19:28.000000 5897 server.cc:241] "CudaDriverHelper has not been initialized."'


@pytest.mark.parametrize(
    ("lines", "exit_code", "sentence"),
    [
        pytest.param(
            ["paged: error: the first", "paged: error: the second", NOT_LOADED],
            1,
            "the first",
            id="ours comes first, told once",
        ),
        pytest.param(
            ["paged: 2026-11-29T08:05:11.042Z [chat] error: no room", NOT_LOADED],
            1,
            "no room",
            id="ours, with time and model",
        ),
        pytest.param(
            [NOISE, NOT_LOADED, CREATING],
            1,
            "the model could not be loaded: RuntimeError: no room",
            id="model not loaded",
        ),
        pytest.param([NOISE, BUSY], 1, "port 8000 on 127.0.0.1 is already in use", id="busy port"),
        pytest.param(
            [NOISE, CREATING],
            1,
            "tritonserver could not start: Internal - failed to load all models",
            id="server not created",
        ),
        pytest.param(
            ["tritonserver: unrecognized option '--x'", *["help"] * 1000],
            1,
            "tritonserver has no option --x",
            id="unknown option",
        ),
        pytest.param([NOISE], 3, "tritonserver ended with exit code 3; --log-verbose shows its log", id="exit code"),
        pytest.param([], -9, "tritonserver was killed by SIGKILL; --log-verbose shows its log", id="signal"),
    ],
)
def test_a_failure_is_one_sentence_from_the_best_source(lines: list[str], exit_code: int, sentence: str) -> None:
    log = ServerLog(show_all=False)
    for line in lines:
        log.add(line)
    assert log.failure(exit_code) == sentence


@pytest.mark.parametrize(
    ("line", "quiet", "verbose"),
    [
        ("paged: loading weights 45 % (3.2 of 7.1 GB)", True, True),
        ("paged: error: told at the end", False, True),
        ("paged: 2026-11-29T08:05:11.042Z [chat] engine ready after 2.1 s", True, True),
        ("paged: 2026-11-29T08:05:11.042Z [chat] error: told at the end", False, True),
        (NOISE, False, True),
        ("unpaged: line", False, True),
    ],
)
def test_only_our_lines_are_shown_unless_all_are_wanted(line: str, quiet: bool, verbose: bool) -> None:
    assert (ServerLog(show_all=False).add(line), ServerLog(show_all=True).add(line)) == (quiet, verbose)


def test_errors_of_a_server_that_serves_are_shown_as_they_come_and_the_last_one_is_why_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = ServerLog(show_all=False)
    assert not log.add("paged: error: told at the end")
    log.note_ready()
    assert log.failure(3) == "tritonserver ended with exit code 3; --log-verbose shows its log"
    assert log.add("paged: 2026-11-29T08:05:11.042Z [chat] error: the engine died: SIGKILL")
    assert log.add("paged: 2026-11-29T08:05:12.042Z [chat] error: there is no engine any more")
    assert log.failure(0) == "there is no engine any more"
    an_hour_later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: an_hour_later)
    assert log.failure(-9) == "tritonserver was killed by SIGKILL; --log-verbose shows its log"


def test_the_first_and_the_last_lines_are_kept() -> None:
    log = ServerLog(show_all=False)
    for number in range(10_000):
        log.add(f"line {number}")
    assert len(log.lines()) < 1000
    assert (log.lines()[0], log.lines()[-1]) == ("line 0", "line 9999")
