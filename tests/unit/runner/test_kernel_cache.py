"""Where compiled kernels are kept."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from paged_backend.runner.kernel_cache import keep_kernels


@pytest.mark.parametrize(("variable", "below"), [("XDG_CACHE_HOME", "paged"), ("HOME", ".cache/paged")])
def test_each_version_of_package_and_compiler_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    versions = {"paged-backend": "0.1.0", "triton": "3.6.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    first = {variable: str(tmp_path)}
    folder = tmp_path / below / "kernels-0.1.0-triton-3.6.0"
    assert keep_kernels(first) == f"compiled kernels are kept in {folder} (empty, so this start compiles them)"
    assert first["TRITON_CACHE_DIR"] == str(folder)
    (folder / "AB").mkdir()
    assert keep_kernels({variable: str(tmp_path)}) == f"compiled kernels are kept in {folder} (1 entries)"
    versions["triton"] = "3.7.0"
    other = {variable: str(tmp_path)}
    assert "empty" in keep_kernels(other)
    assert other["TRITON_CACHE_DIR"] != first["TRITON_CACHE_DIR"]


def test_the_operators_choice_stays(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": "/cache/triton", "HOME": str(tmp_path)}
    assert keep_kernels(environment) == "compiled kernels are kept in /cache/triton (TRITON_CACHE_DIR)"
    assert environment["TRITON_CACHE_DIR"] == "/cache/triton"
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_operator_is_told_and_the_start_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert keep_kernels(environment).startswith("compiled kernels are not kept: ")
    assert "TRITON_CACHE_DIR" not in environment
