"""docs/models.md and `paged models` list what the registry has."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from paged_backend.models.families.registry import FAMILIES
from paged_backend.models.quantization.reading import METHODS
from paged_client.cli import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_page_lists_every_family_with_its_models() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
    assert {architecture: models for architecture, models, _ in rows} == {
        name: family.models for name, family in FAMILIES.items()
    }
    assert all(family.models for family in FAMILIES.values())


def test_the_page_shows_the_smallest_family_word_for_word() -> None:
    (shown,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    assert shown == (ROOT / "paged_backend" / "models" / "families" / "internlm3.py").read_text(encoding="utf-8")


def test_the_command_prints_every_family_and_format() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    assert all(word in result.stdout for word in (*FAMILIES, *METHODS))
