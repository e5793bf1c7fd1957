"""What is logged cannot be forged by callers, and quotes none of them."""

from __future__ import annotations

import io
import logging
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest

from paged_backend.config import EngineConfig
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.front_end import FrontEnd
from paged_backend.log_lines import LogLines, without_stamp
from paged_backend.request import Outputs, Request, SamplingParams
from tests.unit.frontend.test_front_end import COMMAND

SECRET = "SESAME"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Everything that the package logs, as it would be written to stderr."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LogLines("chat"))
    log = logging.getLogger("paged")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield written
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_line_cannot_be_ended_nor_a_terminal_commanded(lines: io.StringIO) -> None:
    logging.getLogger("paged").error("named %s", "a\nb\r\x1b[2Jc\u2028d\x85 é 日本")
    assert without_stamp(lines.getvalue()) == "paged: named a\\x0ab\\x0d\\x1b[2Jc\\u2028d\\x85 é 日本\n"


def test_a_line_has_its_time_in_utc_and_the_models_name(lines: io.StringIO) -> None:
    before = datetime.now(timezone.utc)
    logging.getLogger("paged").info("ready")
    found = re.fullmatch(r"paged: (\S+) \[chat\] ready\n", lines.getvalue())
    assert found is not None, lines.getvalue()
    assert (
        timedelta(0)
        <= datetime.fromisoformat(found[1].replace("Z", "+00:00")) - before + timedelta(milliseconds=1)
        < timedelta(seconds=10)
    )


@pytest.mark.parametrize(
    "line", ["paged: ready", "E1122 21:19:28.000000 5897 server.cc:241] no", "paged: 2026 [x] y", ""]
)
def test_lines_of_others_stay_as_they_are(line: str) -> None:
    assert without_stamp(line) == line


def test_an_exception_is_told_by_its_type_and_place_and_not_by_its_text(lines: io.StringIO) -> None:
    def read(prompt: str) -> None:
        try:
            {}[prompt]
        except KeyError as error:
            raise ValueError(f"cannot read {prompt}\npaged: forged") from error

    try:
        read(SECRET)
    except ValueError:
        logging.getLogger("paged").exception("a prompt could not be read")
    line = without_stamp(lines.getvalue().rstrip("\n"))
    assert line.startswith("paged: a prompt could not be read: ValueError (test_log_lines.py:")
    assert " read), from KeyError (test_log_lines.py:" in line
    assert SECRET not in line and "forged" not in line


def test_nothing_that_happens_to_a_request_puts_its_prompt_into_the_log(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished, refused, not tokenised, not sent, not decoded."""
    ended = threading.Event()

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        if final:
            ended.set()

    def fail(*_: object) -> None:
        raise ValueError(f"{SECRET}\n{SECRET}")

    def broken_send(deltas: tuple[Delta, ...], final: bool) -> None:
        if final and deltas[-1].error is not None:
            ended.set()
        fail()

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        front_end = FrontEnd(EngineConfig(model="fake", log_requests=True), uuid.uuid4().hex, 1, COMMAND)
        cases = [
            ("tokens=4", {}, send, {}),
            ("error", {}, send, {}),
            ("tokens=4", {"max_tokens": 10**6}, send, {}),
            ("tokens=4", {}, broken_send, {}),
            ("tokens=4", {}, send, {"paged_backend.frontend.prompt.PromptReader.read": fail}),
            ("tokens=4", {}, send, {"paged_backend.frontend.answer.AnswerText.add": fail}),
        ]
        for words, sampling, sender, broken in cases:
            with pytest.MonkeyPatch.context() as patch:
                for place, replacement in broken.items():
                    patch.setattr(place, replacement)
                ended.clear()
                params = SamplingParams(**{"max_tokens": 8, **sampling})  # type: ignore[arg-type]
                request = Request(
                    text=f"{SECRET} {words}\n",
                    input_ids=None,
                    sampling=params,
                    outputs=Outputs(),
                    stream=True,
                    prepend_prompt=True,
                    arrival=time.monotonic(),
                )
                front_end.ask(request, sender, lambda: False)
                assert ended.wait(20)
        front_end.close(5)
    text = "\n".join(map(without_stamp, lines.getvalue().splitlines()))
    assert text.count("paged: request ") >= 5, text
    assert "could not be read" in text and "could not be sent" in text
    assert SECRET not in text
    assert all(line.startswith("paged: ") for line in text.splitlines())
