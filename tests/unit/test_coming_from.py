"""docs/from-*.md: what stands in their column "paged" exists by that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paged_backend.config import TUNABLES, repository_folder
from paged_backend.frontend.metrics import FAMILIES
from paged_backend.request import SamplingParams

DOCS = Path(__file__).parents[2] / "docs"
PBTXT = repository_folder() / "paged_llm" / "config.pbtxt"
OTHERS = {
    "config.pbtxt",
    "model_repository/paged_llm",
    'backend: "python"',
    "docker/",
    "INVALID_ARGUMENT",
    "UNAVAILABLE",
    "paged serve --set NAME",
    "state",
}


def known_names() -> set[str]:
    tensors = re.findall(r'\{ name: "(\w+)"', PBTXT.read_text())
    return {
        *TUNABLES,
        *SamplingParams.__struct_fields__,
        *tensors,
        *(family.name for family in FAMILIES),
    }


@pytest.mark.parametrize("page", sorted(DOCS.glob("from-*.md")), ids=lambda page: page.stem)
def test_every_name_of_ours_in_the_tables_exists(page: Path) -> None:
    known, column, seen = known_names(), None, set()
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = cells.index("paged")
        else:
            seen |= {word.partition("=")[0] for word in re.findall(r"`([^`]+)`", cells[column])} - OTHERS
    assert len(seen) > 20
    assert seen <= known, seen - known
