"""Two commits' benchmarks in alternation (tests/bench/compare.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.bench.compare import compare, ratios, table, tree_of

BENCH = """
import json, pathlib
import paged_backend, paged_kernels
state = pathlib.Path({state!r})
state.write_text(state.read_text() + {name!r})
count = state.read_text().count({name!r})
row = {{"bench": "toy", "sequences": 7, "kernels": paged_kernels.NAME, "ms": paged_backend.MS + count, "flag": True}}
print("not a row")
print(json.dumps({{**row, "nested": {{"loops": 10.0 * count}}}}))
"""


def make_tree(folder: Path, name: str, ms: float) -> Path:
    for package, text in (
        ("paged_backend", f"MS = {ms}"),
        ("kernels", "NAME = 'one'"),
        ("client", ""),
        ("tests", ""),
        ("tests/bench", ""),
    ):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(text)
    state = folder.parent / "order"
    state.touch()
    (folder / "tests/bench/bench_toy.py").write_text(BENCH.format(state=str(state), name=name))
    return folder


def test_both_trees_run_in_alternation_each_with_its_own_packages(tmp_path: Path) -> None:
    old, new = make_tree(tmp_path / "old-tree", "a", 99.0), make_tree(tmp_path / "new-tree", "b", 49.0)
    ms, loops = compare(old, new, tmp_path, ["bench_toy"], 3)
    assert (tmp_path / "order").read_text() == "abbaab"
    assert (ms.bench, ms.row, ms.figure) == ("toy", "sequences 7, kernels one, flag True", "ms")
    assert (ms.old, ms.new, ms.rounds, ms.steady) == (101, 51, 3, True)
    assert (ms.lowest, ms.ratio, ms.highest) == (0.5, round(51 / 101, 4), round(52 / 102, 4))
    assert (loops.figure, loops.ratio, loops.steady) == ("nested.loops", 1.0, False)
    lines = table([ms, loops]).splitlines()
    assert lines[1] == "toy: sequences 7, kernels one, flag True"
    assert lines[2].endswith("*")
    assert not lines[3].endswith("*")


def test_a_benchmark_that_one_tree_lacks_is_the_others_with_its_own_packages(tmp_path: Path) -> None:
    old, new = make_tree(tmp_path / "old-tree", "a", 99.0), make_tree(tmp_path / "new-tree", "b", 49.0)
    (old / "tests/bench/bench_toy.py").unlink()
    ms, _ = compare(old, new, tmp_path, ["bench_toy"], 1)
    assert (tmp_path / "order").read_text() == "bb"
    assert (ms.old, ms.new) == (100, 51)


def test_a_benchmark_that_neither_tree_has_is_refused(tmp_path: Path) -> None:
    old, new = make_tree(tmp_path / "old-tree", "a", 99.0), make_tree(tmp_path / "new-tree", "b", 49.0)
    with pytest.raises(ValueError, match="neither of them has a .*bench_none.py"):
        compare(old, new, tmp_path, ["bench_none"], 1)


def test_processes_without_pythonpath_see_their_trees_packages_too(tmp_path: Path) -> None:
    """As a Triton Server's front ends are started: `python3` of the environment's folder of programs."""
    old, new = make_tree(tmp_path / "old-tree", "a", 99.0), make_tree(tmp_path / "new-tree", "b", 49.0)
    for tree in (old, new):
        (tree / "tests/bench/bench_child.py").write_text(
            "import json, pathlib, subprocess, sys\n"
            "program = 'import paged_backend; print(paged_backend.MS)'\n"
            "python3 = pathlib.Path(sys.executable).with_name('python3')\n"
            "said = subprocess.run([python3, '-c', program], env={}, cwd='/', capture_output=True, check=True).stdout\n"
            "print(json.dumps({'bench': 'child', 'ms': float(said)}))\n"
        )
    (ms,) = compare(old, new, tmp_path, ["bench_child"], 1)
    assert (ms.old, ms.new) == (99, 49)


def test_runs_with_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of the runs: \[1, 2\]"):
        ratios([[{"ms": 1}]], [[{"ms": 1}, {"ms": 2}]])


def test_a_commit_is_checked_out_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    subprocess.run(["git", "init", "--quiet"], check=True)
    (repository / "file").write_text("old")
    subprocess.run(["git", "add", "."], check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "first"], check=True)
    (repository / "file").write_text("new")
    with tree_of("HEAD", tmp_path / "tree") as tree:
        assert (tree / "file").read_text() == "old"
    assert not (tmp_path / "tree").exists()
    worktrees = subprocess.run(["git", "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1
    with tree_of(str(repository), tmp_path / "tree") as tree:
        assert tree == repository.resolve()
    assert repository.is_dir()
