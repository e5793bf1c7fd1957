"""What `paged --help` looks like in a terminal of 80 columns."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paged_client.cli import app

_COMMANDS = ["", "serve", "demo", "generate", "chat", "openai", "top", "models", "bench", "bench memory"]


@pytest.mark.parametrize("command", _COMMANDS, ids=[command or "paged" for command in _COMMANDS])
def test_help_fits_80_columns_and_no_sentence_is_cut(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert not [line for line in lines if len(line) > 80]
    listed = lines[lines.index("Commands:") :] if "Commands:" in lines else []
    assert not [line for line in listed if line.endswith("...")]
