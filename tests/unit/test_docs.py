"""README.md and docs/: links lead somewhere, files that are named exist, excerpts are the code's own words, and every
metric is told of.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from paged_backend.config import repository_folder
from paged_backend.frontend.metrics import FAMILIES
from paged_backend.request import SamplingParams

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "docker/README.md",
        ROOT / "docker/helm/paged/README.md",
        *DOCS.glob("*.md"),
        *ROOT.glob("tools/*/README.md"),
    ]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file or folder in backticks (or in the picture), such as `scheduler/fairness.py`, `kernels/reference_*.py` or
# `models/families/`.
NAMED_FILE = re.compile(r"`((?:[\w*]+/)*[\w*]+\.(?:py|pbtxt|md)|(?:\w+/)+)`")
WINGS = ROOT / "paged_backend"


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not target.exists() or (bool(anchor) and anchor not in anchors(target))


def exists(name: str) -> bool:
    return any(any(folder.glob(name)) for folder in (ROOT, WINGS, ROOT / "model_repository/paged_llm"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_two_versions_of_a_place(page: Path) -> None:
    """As a merge leaves them that nobody has settled."""
    assert re.findall(r"^(?:<<<<<<<|=======|>>>>>>>).*$", page.read_text(), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if broken(page, link)] == []


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    readme = ROOT / "README.md"
    assert (
        broken(readme, "docs/no-such-page.md")
        and broken(readme, "docs/architecture.md#no-such-heading")
        and broken(readme, "#no-such-heading")
    )
    assert not broken(readme, "docs/architecture.md#one-step-in-five-files")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_row_of_a_table_has_as_many_cells_as_its_head(page: Path) -> None:
    tables = re.findall(r"^(?:\|.*\n)+", prose(page), re.MULTILINE)
    rows = [[len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()] for table in tables]
    assert [
        table.splitlines()[counts.index(wrong)]
        for table, counts in zip(tables, rows, strict=True)
        for wrong in counts
        if wrong != counts[0]
    ] == []


def test_files_that_the_architecture_names_exist() -> None:
    names = NAMED_FILE.findall(ARCHITECTURE)
    assert len(names) > 100
    assert [name for name in names if not exists(name)] == []


def test_files_that_its_picture_names_exist() -> None:
    names = re.findall(
        r"\w+/\w+\b(?!\.org|/)",
        re.sub(r"<(?!/?text|/?tspan)[^>]*>|<[^>]*>", " ", (DOCS / "pictures/architecture.svg").read_text()),
    )
    assert len(names) > 10
    assert [name for name in names if not exists(name) and not exists(f"{name}.py")] == []


def test_every_wing_has_a_row_in_the_architecture() -> None:
    wings = {path.parent.name for path in WINGS.glob("*/__init__.py")}
    assert {wing for wing in wings if f"| `paged_backend/{wing}/` |" not in ARCHITECTURE} == set()


def test_one_step_in_five_files_is_the_code_word_for_word() -> None:
    section = ARCHITECTURE.split("## One step in five files")[1].split("\n## ")[0]
    _, *parts = re.split(r"^\*\*\d\. `([\w/]+\.py)`", section, flags=re.MULTILINE)
    steps = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(steps) == 5
    for name, part in steps.items():
        source = (WINGS / name).read_text()
        excerpts = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        assert excerpts, name
        for excerpt in excerpts:
            assert any(textwrap.indent(excerpt, " " * depth) in source for depth in (0, 4, 8, 12)), (
                f"{name} has changed: copy it again\n{excerpt}"
            )
    assert sum(len((WINGS / name).read_text().splitlines()) for name in steps) < 1000


def test_the_readme_sells_and_starts_in_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_server_and_the_language_are_not_called_by_the_same_word(page: Path) -> None:
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(page))
    assert re.findall(r".{30}\bTriton\b(?![\s-]+(?:Inference\s+)?(?:Server|language)).{0,20}", text, re.DOTALL) == []


def test_every_sampling_key_and_tensor_is_in_the_reference() -> None:
    tensors = re.findall(r'\{ name: "(\w+)"', (repository_folder() / "paged_llm/config.pbtxt").read_text())
    told = set(re.findall(r"`(\w+)`", (DOCS / "reference.md").read_text()))
    assert len(tensors) > 30
    assert {*SamplingParams.__struct_fields__, *tensors} - told == set()


def test_every_metric_is_in_the_reference() -> None:
    section = (DOCS / "reference.md").read_text().split("\n## Metrics")[1]
    told = set(re.findall(r"`(\w+)(?:\{[^`]*)?`", section))
    assert {family.name for family in FAMILIES} - told == set()
