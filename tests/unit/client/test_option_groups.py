"""A dataclass among a command's parameters stands on the command line as its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from paged_client.option_groups import with_option_groups


@dataclass(frozen=True)
class Place:
    host: Annotated[str, typer.Option("--host", "-H", help="Where.")] = "here"
    port: Annotated[int, typer.Option(min=1, help="Which door.")] = 80


@dataclass(frozen=True)
class Words:
    word: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None


def run(*arguments: str) -> tuple[int, str, list[object]]:
    """(exit code, output, what the command got)."""
    app, got = typer.Typer(rich_markup_mode=None), []

    @app.command()
    @with_option_groups
    def visit(
        *,
        context: typer.Context,
        name: Annotated[str, typer.Argument(help="Who.")] = "nobody",
        place: Place,
        loud: Annotated[bool, typer.Option("--loud")] = False,
        words: Words,
    ) -> None:
        """Go there."""
        got.extend((context.info_name, name, place, loud, words))

    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output, got


def test_a_command_gets_dataclasses_of_what_was_given_and_of_defaults() -> None:
    assert run() == (0, "", ["visit", "nobody", Place(), False, Words()])
    assert run("Ada", "-H", "there", "--port", "7", "--loud", "--word", "a", "--word", "b")[2] == [
        "visit", "Ada", Place("there", 7), True, Words(["a", "b"]),
    ]  # fmt: skip


def test_help_lists_the_options_in_the_order_of_parameters_and_fields() -> None:
    _, text, _ = run("--help")
    places = [text.index(name) for name in ("Go there.", "Who.", "-H, --host", "--port", "--loud", "--word")]
    assert places == sorted(places)
    assert "Which door." in text and "80" in text


def test_a_field_keeps_its_limits() -> None:
    code, text, got = run("--port", "0")
    assert code == 2 and "'--port'" in text and got == []
