"""Fuzzing by hand: `python -m tests.fuzz TARGET --seconds 600`. Input that finds something new is kept in
tests/fuzz/corpus/TARGET, which the tests replay.

With atheris installed (`pip install atheris`, Python up to 3.13) coverage guides the search; without it hypothesis
draws bytes and mixes what is in the corpus. An input that breaks something is written to
tests/fuzz/corpus/TARGET/crash-…: commit it with the fix.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.corpus import read_corpus

FOLDER = Path(__file__).parent / "corpus"
_LONGEST = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="request, sampling, chat, detokenizer, page_tables, scheduling")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = FOLDER / args.target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import atheris
    except ImportError:
        _mix(args.target, args.seconds, args.seed, folder)
        return
    with atheris.instrument_imports(include=["paged_backend"]):
        from tests.fuzz.targets import TARGETS
    options = [
        f"-max_total_time={args.seconds}",
        f"-seed={args.seed}",
        f"-max_len={_LONGEST}",
        f"-artifact_prefix={folder}/",
        "-timeout=20",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], _without_noise(TARGETS[args.target]))
    atheris.Fuzz()


def _without_noise(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    return lambda content: target(bytes(content))


def _mix(name: str, seconds: int, seed: int, folder: Path) -> None:
    """Pieces of the corpus in another order, with some bytes changed."""
    from tests.fuzz.targets import TARGETS

    chance, known, runs = random.Random(seed), [content for _, content in read_corpus(name)] or [b"a"], 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        parts = []
        for _ in range(chance.randint(1, 3)):
            content = chance.choice(known)
            start = chance.randrange(len(content) + 1)
            parts.append(content[start : start + chance.randint(0, len(content))])
        mixed = bytearray(b"".join(parts)[:_LONGEST])
        for _ in range(chance.randint(0, 6)):
            mixed.insert(chance.randrange(len(mixed) + 1), chance.randrange(256))
        runs += 1
        try:
            TARGETS[name](bytes(mixed))
        except BaseException:
            path = folder / f"crash-{hashlib.sha1(mixed).hexdigest()}"
            path.write_bytes(mixed)
            print(f"kept in {path}", file=sys.stderr)
            raise
    print(f"{name}: {runs} inputs, nothing found", file=sys.stderr)


if __name__ == "__main__":
    main()
