"""What import-linter cannot see, because `kernels/` has no `__init__.py`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
ALLOWED = {"torch", "triton", "paged_kernels"} | sys.stdlib_module_names


def imported(source: str) -> set[str]:
    """Top-level names of everything that `source` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda file: str(file.relative_to(KERNELS)))
def test_kernels_import_only_torch_and_triton(file: Path) -> None:
    assert imported(file.read_text()) <= ALLOWED


def test_kernels_is_no_package_of_its_own() -> None:
    """transformers imports a package named `kernels` where there is one."""
    assert KERNELS.is_dir()
    assert not (KERNELS / "__init__.py").exists()
