"""`--set KEY=VALUE`, as commands that start a server take it."""

from __future__ import annotations

import typer


def parse_options(options: list[str]) -> dict[str, str]:
    """["page_size=32"] -> {"page_size": "32"}.

    Raises:
        typer.BadParameter: not of the form KEY=VALUE, or a key given twice.
    """
    parsed: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"'{option}' is not of the form KEY=VALUE", param_hint="--set")
        if key in parsed:
            raise typer.BadParameter(f"'{key}' is given twice", param_hint="--set")
        parsed[key] = value
    return parsed
