"""A tritonserver that is killed, at any moment of its life. Prints a JSON report.

    python -m tests.chaos.server_kills --kills 50 --seed 1 [--engine real]

Every round starts a real tritonserver with front ends of its own, and sends it SIGKILL while something goes on: while
it starts, idles, answers, loses its callers, loads the model, loads it anew, unloads it, or stops. Nothing that it
started may then live for long, and what its front ends shared with it in /dev/shm must be gone. Processes are known by
their folder for temporary files, so those count, too, that have lost their parents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.config import demo_model_folder
from tests.chaos.wishes import save_shallow
from tests.server.front_end_server import MODEL, WITH_FAKE_ENGINE, FrontEndServer, send, serving

GONE_SECONDS = 10.0
_SERVER_GONE_SECONDS = 5.0
_NUM_STREAMS = 16
_REAL_OPTIONS = {"dtype": "float32", "num_pages": "200", "max_model_len": "512"}


class Streams:
    """Callers, each with a stream of its own, that ask without an end."""

    def __init__(self, server: FrontEndServer) -> None:
        self._clients = [grpc.InferenceServerClient(server.grpc) for _ in range(_NUM_STREAMS)]
        for number, client in enumerate(self._clients):
            client.start_stream(lambda result, error: None)
            send(client, f"tokens=400 delay=0.002 {number}", stream=True, max_tokens=400)

    def leave(self) -> None:
        for client in self._clients:
            with suppress(InferenceServerException):
                client.stop_stream(cancel_requests=True)
            client.close()


class Moments:
    """What goes on when the server is killed: a name, and what begins it."""

    def __init__(self, server: FrontEndServer, chance: random.Random, load_factor: float) -> None:
        """load_factor: how much longer than with the fake engine a load takes."""
        self._server, self._chance, self._load_factor = server, chance, load_factor
        self._streams: Streams | None = None

    def starts(self) -> None:
        time.sleep(self._chance.uniform(0, 7 * self._load_factor))

    def loads(self) -> None:
        self._server.wait_until_live()
        self._in_background(self._server.load)
        time.sleep(self._chance.uniform(0, 5 * self._load_factor))

    def idles(self) -> None:
        time.sleep(self._chance.uniform(0, 1))

    def answers(self) -> None:
        self._streams = Streams(self._server)
        time.sleep(self._chance.uniform(0, 2))

    def loses_callers(self) -> None:
        self.answers()
        self._in_background(self._streams.leave if self._streams else lambda: None)
        time.sleep(self._chance.uniform(0, 0.3))

    def loads_anew(self) -> None:
        self.answers()
        (self._server.log.parent / "repository" / MODEL / "config.pbtxt").touch()
        self._in_background(self._server.load)
        time.sleep(self._chance.uniform(0, 4 * self._load_factor))

    def unloads(self) -> None:
        self.answers()
        self._in_background(self._server.unload)
        time.sleep(self._chance.uniform(0, 3))

    def stops(self) -> None:
        self.answers()
        self._server.process.terminate()
        time.sleep(self._chance.uniform(0, 3))

    def close(self) -> None:
        if self._streams is not None:
            self._streams.leave()

    def _in_background(self, call: Callable[[], object]) -> None:
        def run() -> None:
            with suppress(Exception):
                call()

        threading.Thread(target=run, daemon=True).start()


MOMENTS = ("starts", "loads", "idles", "answers", "loses_callers", "loads_anew", "unloads", "stops")


def kill_once(folder: Path, moment: str, chance: random.Random, real: Path | None) -> dict[str, Any]:
    """One server from its start until nothing of it lives. `seconds`: how long the last process took; `left` and
    `shared`: the processes that still lived after GONE_SECONDS, and files in /dev/shm; `crashed`: the server died
    before it was killed.

    real: a checkpoint, for the real engine.
    """
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    prefix = f"kills-{os.getpid()}-{time.monotonic_ns()}-"
    crashed = False
    try:
        with serving(
            folder / "server",
            instances=3,
            load=moment != "loads",
            options=None if real is None else {**_REAL_OPTIONS, "model": str(real)},
            model_py=WITH_FAKE_ENGINE if real is None else None,
            arguments=[f"--backend-config=python,shm-region-prefix-name={prefix}", "--exit-timeout-secs=8"],
            scratch=scratch,
            wait=moment not in ("starts", "loads"),
        ) as server:
            moments = Moments(server, chance, 1 if real is None else 2.5)
            getattr(moments, moment)()
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(_SERVER_GONE_SECONDS)
            seconds = _wait_until_gone(scratch)
            moments.close()
        log = (folder / "server" / "server.log").read_text(errors="replace")
    except (AssertionError, InferenceServerException) as error:
        log, crashed = f"the server died by itself: {error}", True  # 2.51.0 does on an overloaded machine
        seconds = _wait_until_gone(scratch)
    left = [_command(pid) for pid in _processes(scratch)]
    shared = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
    _end(scratch, prefix)
    shared = [] if crashed else shared  # of stubs that had not begun to run our code, perhaps
    return {"seconds": seconds, "left": left, "shared": shared, "crashed": crashed, "log": log.splitlines()[-30:]}


def _wait_until_gone(scratch: Path) -> float:
    started = time.monotonic()
    while _processes(scratch) and time.monotonic() < started + GONE_SECONDS:
        time.sleep(0.05)
    return time.monotonic() - started


def _processes(scratch: Path) -> list[int]:
    """Those that have `scratch` as their folder for temporary files; zombies are none."""
    mark = f"TMPDIR={scratch}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes() + b"\0":
                    found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_text()}".replace("\0", " ")
    return f"{pid}"


def _end(scratch: Path, prefix: str) -> None:
    """Whatever is left."""
    for pid in _processes(scratch):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def run_kills(kills: int, seconds: float, seed: int, engine: str) -> tuple[dict[str, Any], list[str]]:
    """(the report, the faults). No round begins after `seconds`."""
    counts: Counter[str] = Counter()
    took: list[float] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="serverkills-", dir="/tmp") as given:
        folder = Path(given)
        real = folder / "model" if engine == "real" else None
        if real is not None:
            save_shallow(real, demo_model_folder(), 1)
        started = time.monotonic()
        for number in range(kills):
            if time.monotonic() > started + seconds:
                break
            moment = MOMENTS[number % len(MOMENTS)]
            found = kill_once(folder / str(number), moment, random.Random(f"{seed}/{number}"), real)
            counts[moment] += 1
            took.append(found["seconds"])
            counts["servers that crashed by themselves"] += found["crashed"]
            counts["processes left"] += len(found["left"])
            counts["files left in /dev/shm"] += len(found["shared"])
            if found["left"] or found["shared"]:
                log = "\n  ".join(found["log"])
                faults.append(f"seed {seed}, kill {number}, {moment}: {found['left']}, {found['shared']}\n  {log}")
                print(f"FAULT {faults[-1][:4000]}", file=sys.stderr, flush=True)
            print(f"{number}: {moment}, {found['seconds']:.1f} s, {dict(counts)}", file=sys.stderr, flush=True)
    report = {"bench": "server kills", "engine": engine, "seed": seed, "kills": len(took), **counts}
    report |= {"seconds_p50": round(statistics.median(took), 2), "seconds_max": round(max(took), 2)}
    return report | {"faults": len(faults)}, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    plan = parser.parse_args()
    report, faults = run_kills(plan.kills, plan.seconds, plan.seed, plan.engine)
    print(json.dumps(report), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
