"""What pip is to be told for an optional part."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_backend import extras

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
REQUIREMENTS = [
    "torch>=2.11",
    "xgrammar<0.3,>=0.2.8; extra == 'structured'",
    "nvidia-pytriton==0.7.0; python_version < '3' and extra == 'serve'",
    "tritonclient[all]>=2.50; extra == 'serve'",
]


def test_the_packages_themselves_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.metadata, "requires", lambda name: REQUIREMENTS)
    assert extras.install_command("structured") == "pip install 'xgrammar<0.3,>=0.2.8'"
    assert extras.install_command("serve") == "pip install 'tritonclient[all]>=2.50'", "what this Python takes"


def test_without_a_distribution_the_sources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise extras.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "requires", missing)
    assert extras.install_command("serve") == "pip install '.[serve]' in the folder of paged's sources"


def test_no_message_names_a_distribution_that_nobody_published() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == extras.DISTRIBUTION
    assert any("xgrammar" in package for package in project["optional-dependencies"]["serve"])
    sources = [
        path
        for folder in ("paged_backend", "client", "kernels", "docs")
        for path in (ROOT / folder).rglob("*.[pm][yd]")
    ]
    assert len(sources) > 50
    named = [
        path
        for path in [*sources, ROOT / "README.md"]
        if "paged-backend[" in path.read_text().replace("`paged-backend[extra]`", "")
    ]
    assert named == []
