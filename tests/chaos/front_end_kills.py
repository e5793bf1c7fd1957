"""Front ends that are killed, and everything beside them: engines, standbys, processes that compile grammars. Prints a
JSON report.

    python -m tests.chaos.front_end_kills --kills 200 --seed 1

In each round some front ends, processes of their own (tests/front_end_process.py), share a real engine with a model of
one layer, which a nursery forks. All of them ask all the time, some for a grammar's words; and at random moments one is
killed after another, with engines (SIGKILL, or SIGSTOP for ever), also one that has just been started, standbys, other
ranks of both, and the processes that work on grammars between them, until one front end is left. No answer of those
that live may be lost, refused, wrong or cut. When they have all theirs, no page may be held: the dead ones' requests
must be forgotten. The last one leaves in peace or is killed: no process and, after peace, no file may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from paged_backend.config import demo_model_folder
from paged_backend.process_id import ProcessId
from tests.chaos.chaotic_engine import Orders
from tests.chaos.nursery import Nursery
from tests.chaos.wishes import save_shallow
from tests.e2e.test_rank_deaths import children_of
from tests.front_end_process import FrontEndProcess

_PROMPTS = [
    f"{kind} Once upon a time there was number {number}" for number in range(2) for kind in ("", "plain", "guided")
]
_COUNTED = {
    "engine": "engines killed",
    "standby": "standbys killed",
    "grammar process": "grammar processes killed",
    "stopped engine": "engines stopped for ever",
    "loading engine": "engines killed soon after a death",
}
_COUNTED_OF_RANKS = {
    "rank": "other ranks killed",
    "stopped rank": "other ranks stopped for ever",
    "standby's rank": "standbys' ranks killed",
}
_STUCK_SECONDS = 60.0
_GONE_SECONDS = 5.0
_TELLS_KILL = re.compile(r"error: front end \d+ \(process \d+\) died: ")  # an engine, of what is done here


class Round:
    """Some front ends from their start to the last one's end."""

    def __init__(
        self,
        count: int,
        folder: Path,
        options: dict[str, Any],
        truth: dict[str, list[int]],
        chance: random.Random,
        register: Path,
    ) -> None:
        """folder: of the sockets. register: where engines and ranks are written down (nursery.py)."""
        self.counts: Counter[str] = Counter({"pages held for the dead": 0, "processes left": 0, "files left": 0})
        self.faults: list[str] = []
        self._truth, self._chance, self._folder = truth, chance, folder
        self._register, self._register_at = register, register.stat().st_size
        key = uuid.uuid4().hex
        self._ranks = options["tensor_parallel_size"] > 1
        self._living = [FrontEndProcess(key, count, folder, **options) for _ in range(count)]
        self._asked: dict[FrontEndProcess, list[str]] = {front_end: [] for front_end in self._living}
        self._processes: set[ProcessId] = set()  # engines and standbys

    def run(self) -> None:
        try:
            if self._wait("the front ends start", lambda: all(front_end.told for front_end in self._living)):
                victims = ["front end"] * (len(self._living) - 1) + [
                    *_COUNTED,
                    *(_COUNTED_OF_RANKS if self._ranks else ()),
                ]
                self._chance.shuffle(victims)
                self._ask()
                for victim in victims:
                    time.sleep(self._chance.choice([0.0, 0.05, 0.3, 0.8]))
                    if victim == "loading engine":
                        self._strike("engine")
                        time.sleep(self._chance.choice([0.1, 0.3, 0.6]))
                    self._strike(victim)
                    self._ask()
                self._check()
                self._end()
        finally:
            for front_end in self._living:
                front_end.kill()

    def _wait(self, what: str, condition: Callable[[], object], seconds: float = _STUCK_SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.faults.append(f"not within {seconds:g} s: {what}")
                return False
            time.sleep(0.02)
        return True

    def _ask(self) -> None:
        """Each has a few questions under way at any time. The number tells their answers apart."""
        for front_end in self._living:
            while len(self._asked[front_end]) - len(front_end.answers) < 4:
                prompt = self._chance.choice(list(self._truth))
                self._asked[front_end].append(prompt)
                with suppress(BrokenPipeError):
                    front_end.ask(f"{prompt}#{len(self._asked[front_end])}")

    def _strike(self, victim: str) -> None:
        if victim == "front end":
            front_end = self._living.pop(self._chance.randrange(len(self._living)))
            self.counts["owners killed"] += bool(front_end.told["owner"])
            front_end.kill()
            self.counts["front ends killed"] += 1
            return
        owner = next((front_end for front_end in self._living if front_end.told["owner"]), None)
        pid = owner and (owner.told["standby"] if victim.startswith("standby") else owner.told["engine"])
        victims = [pid] if pid else []
        if victim == "grammar process":
            victims = _grammar_processes()
        elif victim in _COUNTED_OF_RANKS:
            victims = [rank for of_engine in self._forked_by(pid) for rank in children_of(of_engine)][:1] if pid else []
        for process in victims:
            self._processes.update(filter(None, [ProcessId.of(process)]))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP if victim.startswith("stopped") else signal.SIGKILL)
                self.counts[(_COUNTED | _COUNTED_OF_RANKS)[victim]] += 1

    def _forked_by(self, stand_in: int) -> list[int]:
        """The engine that the nursery has forked for it, if it is known."""
        return [line["engine"] for line in self._registered("engine") if line["stand_in"] == stand_in]

    def _registered(self, key: str) -> list[dict[str, Any]]:
        """The lines of this round that tell of it."""
        with self._register.open() as file:
            file.seek(self._register_at)
            return [line for line in map(json.loads, file) if key in line]

    def _check(self) -> None:
        def answered() -> bool:
            return all(len(front_end.answers) == len(self._asked[front_end]) for front_end in self._living)

        self._wait("answers of the living", answered)
        for front_end in self._living:
            for number, prompt in enumerate(self._asked[front_end], start=1):
                answer = front_end.answers.get(f"{prompt}#{number}")
                self.counts["answers of survivors"] += 1
                if answer is None or answer["error"] or answer["ids"] != self._truth[prompt]:
                    self.faults.append(f"{prompt}: {answer}, right: {self._truth[prompt]}")
            if not self._wait(
                "pages of the dead are free",
                lambda front_end=front_end: front_end.told["owner"] and not front_end.told["held"],
            ):  # type: ignore[misc]
                self.counts["pages held for the dead"] += front_end.told["held"]

    def _end(self) -> None:
        (last,) = self._living
        pids = [last.told["engine"], last.told["standby"]]
        self._processes.update(filter(None, [ProcessId.of(pid) for pid in pids if pid]))
        if self._chance.random() < 0.5:
            if last.leave():
                self.faults.append(f"the last front end left with status {last.process.returncode}")
            left = list(self._folder.rglob("*"))
            self.counts["files left"] += len(left)
            if left:
                self.faults.append(f"left behind: {left}")
        else:
            last.kill()
            self.counts["front ends killed"] += 1
        if not self._wait("engines, standbys and grammar processes are gone", lambda: not self._left(), _GONE_SECONDS):
            self.counts["processes left"] += len(self._left())
            self.faults[-1] += f" {[_described(pid) for pid in self._left()]}"

    def _left(self) -> list[int]:
        born = [line["engine"] for line in self._registered("engine")] + [
            line["rank"] for line in self._registered("rank")
        ]
        stand_ins = [process.pid for process in self._processes if process.alive]
        return stand_ins + [pid for pid in born if "tests.chaos.nursery" in _described(pid)] + _grammar_processes()


def _described(pid: int) -> str:
    """Its state, number and command line; empty if it is gone."""
    if ProcessId.of(pid) is None:
        return ""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"{state} {pid} {Path(f'/proc/{pid}/cmdline').read_text()[:300]!r}"
    return ""


def _grammar_processes() -> list[int]:
    """The nurseries of grammars' processes, and those that compile and follow them."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            ours = folder.name.isdigit() and b"paged_backend.grammar." in (folder / "cmdline").read_bytes()
            if ours and os.environ["PAGED_CHAOS"].encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def find_truth(folder: Path, options: dict[str, Any]) -> dict[str, list[int]]:
    """What each prompt is answered, asked alone."""
    front_end = FrontEndProcess(uuid.uuid4().hex, 1, folder, **options)
    try:
        for prompt in _PROMPTS:
            front_end.ask(f"{prompt}#1")
            deadline = time.monotonic() + _STUCK_SECONDS
            while f"{prompt}#1" not in front_end.answers:
                assert time.monotonic() < deadline and front_end.process.poll() is None
                time.sleep(0.02)
        assert not any(answer["error"] for answer in front_end.answers.values()), front_end.answers
        return {prompt: front_end.answers[f"{prompt}#1"]["ids"] for prompt in _PROMPTS}
    finally:
        front_end.leave()


def run_kills(kills: int, seconds: float, seed: int, count: int, ranks: int = 1) -> tuple[dict[str, Any], list[str]]:
    """(the report, the faults). Ends after so many killed front ends, or seconds."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fekills-", dir="/tmp")))
        os.environ["PAGED_CHAOS"] = folder.name  # tells our processes from another campaign's
        register = folder / "register"
        save_shallow(folder / "model", demo_model_folder(), 1)
        nursery = stack.enter_context(Nursery(Orders(str(register))))
        options = {
            "command": nursery.command,
            "model": str(folder / "model"),
            "dtype": "float32",
            "num_pages": 200,
            "max_model_len": 512,
            "max_engine_restarts": 100,
            "engine_hang_seconds": 4,
            "debug_checks": True,
            "device": "cpu",
            "tensor_parallel_size": ranks,
        }
        sockets = folder / "s"
        sockets.mkdir()
        truth = find_truth(sockets, options)
        started = time.monotonic()
        while counts["front ends killed"] < kills and time.monotonic() < started + seconds:
            counts["rounds"] += 1
            chance = random.Random(f"{seed}/{counts['rounds']}")
            shutil.rmtree(sockets)
            sockets.mkdir()
            one = Round(count, sockets, options, truth, chance, register)
            one.run()
            counts.update(one.counts)
            for fault in one.faults:
                faults.append(f"seed {seed}, round {counts['rounds']}: {fault}")
                print(f"FAULT {faults[-1][:1000]}", file=sys.stderr, flush=True)
            print(dict(counts), file=sys.stderr, flush=True)
        said = [json.loads(line).get("fault") for line in register.read_text().splitlines()]
        faults += [f"the engine failed by itself: {words}" for words in said if words and not _TELLS_KILL.match(words)]
    return {
        "bench": "front end kills",
        "seed": seed,
        "ranks": ranks,
        "seconds": round(time.monotonic() - started),
        **counts,
        "faults": len(faults),
    }, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of front ends, at least")
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--front-ends", type=int, default=8, help="in each round")
    parser.add_argument("--ranks", type=int, default=1, help="tensor_parallel_size")
    plan = parser.parse_args()
    report, faults = run_kills(plan.kills, plan.seconds, plan.seed, plan.front_ends, plan.ranks)
    print(json.dumps(report), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
