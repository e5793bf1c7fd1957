"""Loads and unloads the model over and over in one tritonserver, with requests in between, and looks at what stays. Prints a JSON line.

python -m tests.chaos.reloads --times 50 [--instances 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.bench_streams import family
from tests.chaos.server_door import count_of, resident_bytes
from tests.server.front_end_server import FrontEndServer, serving

KEPT = ("processes", "files", "dev_shm", "folders")  # of which there must be no more, however often the model was loaded
_WARM_UP = 3  # rounds after which the server has everything it allocates once
_SETTLING_SECONDS = 10.0  # what a connection that was just closed may need to be gone
_PROMPT = "tokens=4"


def census(server: FrontEndServer, shm_prefix: str, scratch: Path) -> dict[str, int]:
    """What the server's processes have, with no model loaded."""
    pids = family(server.process.pid)
    return {
        "processes": len(pids),
        "files": sum(count_of(f"/proc/{pid}/fd") for pid in pids),
        "threads": sum(count_of(f"/proc/{pid}/task") for pid in pids),
        "dev_shm": len(list(Path("/dev/shm").glob(f"{shm_prefix}*"))),
        "folders": len(list(scratch.iterdir())),
        "resident": sum(resident_bytes(pid) for pid in pids),
    }


def settled(server: FrontEndServer, shm_prefix: str, scratch: Path, before: list[dict[str, int]]) -> dict[str, int]:
    """The census, after the first of them that has no more files, folders and processes than the warmed-up one, or after a while."""
    deadline = time.monotonic() + _SETTLING_SECONDS
    while True:
        found = census(server, shm_prefix, scratch)
        if len(before) < _WARM_UP or time.monotonic() > deadline or all(found[name] <= before[_WARM_UP - 1][name] for name in KEPT):
            return found
        time.sleep(0.1)


def run_reloads(folder: Path, times: int, instances: int = 2, options: dict[str, str] | None = None) -> dict[str, Any]:
    """The report: `first` is the census after the warm-up, `last` that after the last round; `growth` of resident bytes is between them."""
    prefix = f"reloads-{time.monotonic_ns()}-"
    arguments = [f"--backend-config=python,shm-region-prefix-name={prefix}"]
    censuses, loads, unloads = [], [], []
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as scratch,
        serving(folder, instances=instances, load=False, options=options, arguments=arguments, scratch=Path(scratch)) as server,
    ):
        for _ in range(times):
            started = time.monotonic()
            server.load()
            loads.append(time.monotonic() - started)
            answer = server.ask(_PROMPT, stream=True, max_tokens=4)
            assert answer.error is None and answer.num_finals == 1, answer
            unloads.append(server.unload())
            censuses.append(settled(server, prefix, Path(scratch), censuses))
            print(f"{len(censuses)}: {censuses[-1]}", file=sys.stderr, flush=True)
        server.process.terminate()
        exit_code = server.process.wait(40)
    first, last = censuses[min(_WARM_UP, times) - 1], censuses[-1]
    row: dict[str, Any] = {"bench": "reloads", "times": times, "instances": instances, "first": first, "last": last, "exit_code": exit_code}
    row |= {"growth": round(last["resident"] / first["resident"] - 1, 4), "left": len(list(Path("/dev/shm").glob(f"{prefix}*")))}
    row |= {"load_seconds": round(statistics.median(loads), 2), "unload_seconds": round(statistics.median(unloads), 2)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--instances", type=int, default=2, help="front ends")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        tempfile.tempdir = folder
        print(json.dumps(run_reloads(Path(folder) / "server", args.times, args.instances)), flush=True)


if __name__ == "__main__":
    main()
