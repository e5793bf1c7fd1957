"""`paged serve` and every process under it, killed one after another in every order. Prints a JSON report.

    python -m tests.chaos.launcher_kills --rounds 20 --seed 1

In each round `paged serve` starts a real tritonserver with a real engine (one layer of the embedded model), and callers
ask all the time, some for a grammar's words, some for a chat. Then a front end, the engine, its standby, the processes
that work on grammars, one that renders chat templates, and `paged serve` itself get SIGKILL in a random order. As long
as no front end and not `paged serve` was killed, every answer must be whole and right; after that one may break off,
but what came must be the beginning of the right one. In the end no process may be left, and after the next start's
sweep no folder and nothing in shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from paged_backend.config import demo_model_folder
from paged_backend.server.scratch import sweep
from tests.chaos.wishes import save_shallow

_PAGED = [sys.executable, "-c", "from paged_client.cli import main; main()"]
_NAMES = {  # in a victim's command line
    "front end": "triton_python_backend_stub",
    "engine": "paged_backend.engine.process",
    "standby": "--standby",
    "grammar process": "paged_backend.grammar.",
    "template process": "paged_backend.frontend.template_process",
    "launcher": "paged_client.cli",
}
_FATAL = ("front end", "launcher")  # their deaths may cut answers off
_DRAIN_SECONDS = 8
# a server that lost a front end waits for its requests until its exit timeout
_GONE_SECONDS = 2 * _DRAIN_SECONDS + 20.0
_GUIDED = json.dumps({"temperature": 0, "guided_regex": "[a-z ]{30,40}"})
_GREEDY = json.dumps({"temperature": 0, "ignore_eos": True})
_QUESTIONS: list[dict[str, Any]] = [
    *(
        {"text_input": f"{number} Once upon a time there was", "sampling_parameters": _GREEDY, "max_tokens": 100}
        for number in range(3)
    ),
    *(
        {"text_input": f"{number} Once upon a time there was", "sampling_parameters": _GUIDED, "max_tokens": 100}
        for number in range(2)
    ),
    {
        "messages": json.dumps([{"role": "user", "content": "What was the fox's name?"}]),
        "sampling_parameters": _GREEDY,
        "max_tokens": 60,
    },
]


@dataclass
class Heard:
    """One answer."""

    question: int
    text: str = ""
    error: str = ""
    ended: float = 0.0  # time.monotonic()


class Caller(threading.Thread):
    """Asks one question after another until told to stop."""

    def __init__(self, url: str, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.heard: list[Heard] = []
        self.stopping = False
        self._url, self._chance = url, chance

    def run(self) -> None:
        while not self.stopping:
            heard = ask(self._url, self._chance.randrange(len(_QUESTIONS)))
            self.heard.append(heard)
            if heard.error:
                time.sleep(0.2)


def ask(url: str, question: int) -> Heard:
    heard = Heard(question)
    body = {**_QUESTIONS[question], "stream": True, "exclude_input_in_output": True, "return_finish_reason": True}
    finished = False
    try:
        with urlopen(
            Request(f"{url}/v2/models/paged_llm/generate_stream", json.dumps(body).encode()), timeout=_GONE_SECONDS
        ) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    heard.text += event.get("text_output", "")
                    heard.error = event.get("error", "")
                    finished = event.get("finish_reason", "None") != "None"
    except (OSError, HTTPException, ValueError) as error:
        heard.error = f"{type(error).__name__}: {error}"
    heard.error = heard.error or ("" if finished else "it broke off")
    heard.ended = time.monotonic()
    return heard


class Round:
    """One `paged serve` from its start to the end of everything under it."""

    def __init__(self, model: Path, folder: Path, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._folder, self._chance = folder, chance
        self._restarts = chance.random() < 0.5
        options = {
            "dtype": "float32",
            "num_pages": 200,
            "max_model_len": 512,
            "max_engine_restarts": 100,
            "debug_checks": "true",
            "model": model,
        }
        command = [
            *_PAGED,
            "serve",
            "--instances=3",
            f"--drain-seconds={_DRAIN_SECONDS}",
            *(f"--{name}-port=0" for name in ("http", "grpc", "metrics")),
        ]
        command += ["--on-front-end-death=restart"] * self._restarts + [
            f"--set={name}={value}" for name, value in options.items()
        ]
        environment = os.environ | {"TMPDIR": str(folder)}
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        self._fatal_since = float("inf")
        self._servers: set[str] = set()  # their folders' names

    def url(self) -> str:
        """Waits until the server is ready."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = line.decode().split()
            if words[:1] == ["HTTP"]:
                return words[1]
        raise AssertionError(f"never ready: {(self._folder / 'log').read_text()}")

    def run(self, truth: list[str], order: list[str]) -> None:
        try:
            url = self.url()
            callers = [Caller(url, random.Random(self._chance.random())) for _ in range(4)]
            for caller in callers:
                caller.start()
            time.sleep(self._chance.choice([1.0, 15.0]))  # long enough for an engine that stands by, or not
            for victim in order:
                self._strike(victim)
                time.sleep(self._chance.choice([0.0, 0.1, 1.0, 4.0]))
            for caller in callers:
                caller.stopping = True
            for caller in callers:
                caller.join(_GONE_SECONDS)
                self._judge(caller, truth)
            self._check_that_nothing_is_left()
        finally:
            self.end()

    def _strike(self, victim: str) -> None:
        found = self._processes(victim)
        self._servers |= {path.name for path in self._folder.glob("paged-serve-*")}
        if victim in _FATAL and found:
            self._fatal_since = min(self._fatal_since, time.monotonic())
        for pid in found if victim == "grammar process" else found[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.counts[f"{victim}: killed"] += 1

    def _judge(self, caller: Caller, truth: list[str]) -> None:
        if caller.is_alive():
            self.faults.append("a caller still waits")
        for heard in caller.heard:
            right = truth[heard.question]
            whole = not heard.error and heard.text == right
            self.counts["whole answers" if whole else "answers cut off or refused"] += 1
            if not whole and (heard.ended < self._fatal_since or not heard.error or not right.startswith(heard.text)):
                self.faults.append(f"question {heard.question}: {heard}, right: {right!r}")

    def _check_that_nothing_is_left(self) -> None:
        deadline = time.monotonic() + _GONE_SECONDS
        while left := self._processes():
            if time.monotonic() > deadline:
                self.faults.append(f"left: {[_command(pid) for pid in left]}")
                self.counts["processes left"] += len(left)
                return
            time.sleep(0.1)
        tempfile.tempdir = str(self._folder)
        self.counts["folders left for the next start"] += len(sweep())
        tempfile.tempdir = None
        self.counts["folders left"] += len(list(self._folder.glob("paged-serve-*")))
        shared = [path.name for name in self._servers for path in Path("/dev/shm").glob(f"{name}-*")]
        self.counts["files left in /dev/shm"] += len(shared)
        if shared or self.counts["folders left"]:
            self.faults.append(f"left: {shared}, {list(self._folder.iterdir())}")

    def _processes(self, kind: str = "") -> list[int]:
        """Of this round: our `paged serve` and what has its folder for temporary files; of all kinds, or one."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    command, status = (
                        _command(int(entry.name)),
                        (entry / "stat").read_text().rpartition(")")[2].split()[0],
                    )
                    ours = str(self._folder).encode() in (entry / "environ").read_bytes()
                    if (
                        ours
                        and status != "Z"
                        and _NAMES.get(kind, "") in command
                        and (kind != "engine" or _NAMES["standby"] not in command)
                    ):
                        found.append(int(entry.name))
        return found

    def end(self) -> None:
        """Whatever is left."""
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(20)
        self._log.close()


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def find_truth(model: Path, folder: Path) -> list[str]:
    """What each question is answered, asked alone."""
    quiet = Round(model, folder, random.Random(0))
    try:
        url = quiet.url()
        answers = [ask(url, question) for question in range(len(_QUESTIONS))]
        assert not any(heard.error for heard in answers), answers
        return [heard.text for heard in answers]
    finally:
        quiet.end()


def run_rounds(rounds: int, seconds: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """(the report, the faults). No round begins after `seconds`."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="launcher-", dir="/tmp") as given:
        folder = Path(given)
        model = folder / "model"
        save_shallow(model, demo_model_folder(), 1)
        (folder / "truth").mkdir()
        truth = find_truth(model, folder / "truth")
        started = time.monotonic()
        for number in range(1, rounds + 1):
            if time.monotonic() > started + seconds:
                break
            chance = random.Random(f"{seed}/{number}")
            order = chance.sample(list(_NAMES), len(_NAMES))
            if "launcher" not in order[-2:]:
                order.append("launcher")  # another one may have to be struck: that of a server that was replaced
            (folder / str(number)).mkdir()
            one = Round(model, folder / str(number), chance)
            one.run(truth, order)
            counts.update(one.counts, rounds=1)
            faults += [f"seed {seed}, round {number}, {order}: {fault}" for fault in one.faults]
            for fault in one.faults:
                print(f"FAULT round {number}, {order}: {fault[:1000]}", file=sys.stderr, flush=True)
            print(dict(counts), file=sys.stderr, flush=True)
    return {
        "bench": "launcher kills",
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        **counts,
        "faults": len(faults),
    }, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins after so long")
    parser.add_argument("--seed", type=int, default=1)
    plan = parser.parse_args()
    report, faults = run_rounds(plan.rounds, plan.seconds, plan.seed)
    print(json.dumps(report), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
