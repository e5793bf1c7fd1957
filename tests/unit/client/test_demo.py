"""What `paged demo --speculation` does around its two conversations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from paged_backend.server.launch import ServerSettings
from paged_client.answers import Delta, Usage
from paged_client.asking import Speed
from paged_client.cli import app
from paged_client.demo import Answered, run_demo_twice


def answered(text: str, *num_tokens: int) -> Answered:
    """An answer that came in pieces of so many tokens."""
    speed = Speed()
    for so_far in range(len(num_tokens)):
        speed.take(Delta("", (), None, Usage(num_output_tokens=sum(num_tokens[: so_far + 1]))))
    return Answered(text, speed)


def demo_twice(pieces: tuple[int, ...], stops: bool = False) -> tuple[list[ServerSettings], str]:
    """The settings of the servers that it starts, and what it prints. stops: Ctrl-C while the first one answers."""
    started: list[ServerSettings] = []
    server = SimpleNamespace(stopping=False)
    console = Console(file=StringIO(), width=200)

    @contextmanager
    def running(settings: ServerSettings) -> Iterator[Any]:
        started.append(settings)
        yield server

    def demo(_: Any, console: Console) -> list[Answered]:
        server.stopping = stops
        return [answered("Once", *pieces)]

    settings = ServerSettings(options={"draft_model": "folder", "page_size": 8})
    run_demo_twice(running, settings, "eagle3", demo, console)
    return started, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_second_server_makes_no_guesses_and_has_all_other_options() -> None:
    started, said = demo_twice((1, 40))
    assert [settings.options for settings in started] == [
        {"draft_model": "folder", "page_size": 8, "speculation": "eagle3"},
        {"page_size": 8, "speculation": "off"},
    ]
    assert "tokens/s with speculation" in said and "1 of 1 answers are the same" in said


def test_ctrl_c_while_the_last_answer_is_made_starts_no_second_server() -> None:
    started, said = demo_twice((1, 40), stops=True)
    assert len(started) == 1 and said == ""


@pytest.mark.parametrize("pieces", [(1,), (5,)], ids=["one token", "one piece"])
def test_answers_without_a_later_token_have_no_speed_to_compare(pieces: tuple[int, ...]) -> None:
    assert demo_twice(pieces)[1].splitlines()[1:] == [
        "The same without speculation:",
        "1 of 1 answers are the same, word for word",
    ]


@pytest.mark.parametrize("kind", ["", "off"])
def test_what_guesses_nothing_is_not_compared_with_itself(kind: str) -> None:
    refused = CliRunner().invoke(app, ["demo", "--speculation", kind])
    assert refused.exit_code == 2 and "name what guesses" in refused.output
