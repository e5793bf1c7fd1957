"""Two commits' benchmarks in alternation: what became slower or faster, and how sure that is. Prints JSON lines, and a
table to stderr.

    python -m tests.bench.compare main HEAD
    python -m tests.bench.compare v0.1 HEAD --rounds 5 -- bench_engine --model qwen3-0.6b --batches 1 256

OLD and NEW are commits, or folders with a tree each. A commit is checked out in a temporary folder and removed
afterwards; each has a Python environment of its own, from which a server's front ends take their packages, too. If one
of them has no such benchmark, the other's is run for both. Behind `--` stands a benchmark of tests/bench and its
options; without one it is `bench_scheduler` with 256 and 1,024 sequences. Every round runs both, the one that goes
first changing from round to round, so that what else the machine does meets both. A ratio is NEW / OLD of the same
round: its median, the lowest and the highest of the rounds. steady: the ratios of all rounds lie on one side of 1, by
more than 2 %. The yardsticks' ratio says whether the machine itself changed between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from site import getsitepackages
from venv import EnvBuilder

_DEFAULT = (["bench_scheduler", "--sequences", "256"], ["bench_scheduler", "--sequences", "1024"])
_SURE = 0.02
_PACKAGES = {
    "paged_backend": "paged_backend",
    "paged_kernels": "kernels",
    "paged_client": "client",
    "paged_model_repository": "model_repository",
}

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Ratio:
    """A figure of a benchmark's row, in both commits."""

    bench: str
    row: str  # what tells the row from the bench's others
    figure: str
    old: float  # median of the rounds
    new: float
    ratio: float  # median of the rounds' new / old
    lowest: float
    highest: float
    rounds: int
    steady: bool


def figures(row: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those of what is nested in it by dotted names."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def label(rows: Sequence[Mapping[str, object]]) -> str:
    """What a row is about: the fields that are the same in all runs."""
    first, *others = rows
    return ", ".join(
        f"{name} {value}"
        for name, value in first.items()
        if name != "bench" and not isinstance(value, Mapping) and all(other.get(name) == value for other in others)
    )


def ratios(old: Sequence[Rows], new: Sequence[Rows]) -> list[Ratio]:
    """old, new: the rows of each round. Rows are the same by their places. What is equal in all runs is a setting.

    Raises:
        ValueError: the runs have not equally many rows.
    """
    if len({len(rows) for rows in (*old, *new)}) != 1:
        raise ValueError(
            f"rows of the runs: {[len(rows) for rows in (*old, *new)]}; they can only be compared one by one"
        )
    found = []
    for place in range(len(old[0])):
        before, after = ([figures(rows[place]) for rows in runs] for runs in (old, new))
        common = [name for name in before[0] if all(name in run and run[name] for run in (*before, *after))]
        measured = [name for name in common if len({run[name] for run in (*before, *after)}) > 1]
        for name in measured:
            pairs = [after_run[name] / before_run[name] for before_run, after_run in zip(before, after, strict=True)]
            found.append(
                Ratio(
                    bench=str(old[0][place].get("bench", "")),
                    row=label([rows[place] for rows in (*old, *new)]),
                    figure=name,
                    old=statistics.median(run[name] for run in before),
                    new=statistics.median(run[name] for run in after),
                    ratio=round(statistics.median(pairs), 4),
                    lowest=round(min(pairs), 4),
                    highest=round(max(pairs), 4),
                    rounds=len(pairs),
                    steady=min(pairs) > 1 + _SURE or max(pairs) < 1 - _SURE,
                )
            )
    return found


@contextmanager
def tree_of(commit: str, folder: Path) -> Iterator[Path]:
    """A folder with that commit's files; a folder that is given stays as it is."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True)


def environment(packages: Path, benches: Path, folder: Path) -> Path:
    """A new Python environment's interpreter. It has what this one has, but packages of one tree, and `tests` of
    another if that has the benchmark. PYTHONPATH would not do: a Triton Server's front ends do not heed it.
    """
    EnvBuilder(symlinks=True).create(folder / "venv")
    links = folder / "names"
    links.mkdir()
    for name, source in _PACKAGES.items():
        (links / name).symlink_to(packages / source)
    (links / "tests").symlink_to(benches / "tests")
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in getsitepackages()]
    (own / "names.pth").write_text("\n".join([*lines, f"import sys; sys.path.insert(0, {str(links)!r})"]))
    return folder / "venv" / "bin" / "python"


def run(python: Path, command: Sequence[str]) -> Rows:
    """The rows that a benchmark prints."""
    name, *options = command
    said = subprocess.run(
        [python, "-m", f"tests.bench.{name}", *options],
        cwd=python.parents[2] / "names",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def compare(old: Path, new: Path, folder: Path, command: Sequence[str], rounds: int) -> list[Ratio]:
    """Runs the benchmark in both trees, `rounds` times. folder: for what it needs meanwhile.

    Raises:
        ValueError: neither has it; or they cannot be compared, see `ratios`.
    """
    bench = Path("tests", "bench", f"{command[0]}.py")
    having = [tree for tree in (new, old) if (tree / bench).is_file()]
    if not having:
        raise ValueError(f"neither of them has a {bench}")
    pythons = {}
    for which, tree in (("old", old), ("new", new)):
        own = folder / f"{which}-{command[0]}"
        if not own.exists():
            own.mkdir()
            environment(tree, tree if tree in having else having[0], own)
        pythons[which] = own / "venv" / "bin" / "python"
    runs: dict[str, list[Rows]] = {"old": [], "new": []}
    for number in range(rounds):
        for which in ("old", "new") if number % 2 == 0 else ("new", "old"):
            runs[which].append(run(pythons[which], command))
    return ratios(runs["old"], runs["new"])


def table(found: Sequence[Ratio]) -> str:
    """For people: a line a figure, those that are certain marked."""
    lines = [f"{'figure':38} {'old':>12} {'new':>12} {'new/old':>8}  lowest to highest"]
    heading = ""
    for one in found:
        if heading != (heading := f"{one.bench}: {one.row}"):
            lines.append(heading)
        lines.append(
            f"  {one.figure:36} {one.old:12.5g} {one.new:12.5g} {one.ratio:8.3f}  {one.lowest:.3f} to {one.highest:.3f}"
            + ("  *" if one.steady else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--rounds", type=int, default=3)
    own, command = sys.argv[1:], []
    if "--" in own:
        command = own[own.index("--") + 1 :]
        own = own[: own.index("--")]
    args = parser.parse_args(own)
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is less than 1")
    commands = [command] if command else _DEFAULT
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        with tree_of(args.old, here / "old") as old, tree_of(args.new, here / "new") as new:
            found = []
            for bench in commands:
                found += compare(old, new, here, bench, args.rounds)
    for one in found:
        print(json.dumps({"compared": [args.old, args.new], **asdict(one)}), flush=True)
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
