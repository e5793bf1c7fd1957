"""Loads and unloads the model over and over in one tritonserver, with requests in between, and looks at what stays.
Prints a JSON line.

python -m tests.chaos.reloads --times 50 [--instances 2] [--stay 13] [--model FOLDER] [--set KEY=VALUE …]
python -m tests.chaos.reloads --bare      # a model that does nothing: what Triton Server itself keeps
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.bench_streams import family
from tests.chaos.server_door import count_of, resident_bytes
from tests.server.front_end_server import WITH_FAKE_ENGINE, FrontEndServer, serving

# of which there must be no more, however often the model was loaded
KEPT = ("processes", "files", "dev_shm", "folders", "gpu_mib")
_WARM_UP = 3  # rounds after which the server has everything it allocates once
_SETTLING_SECONDS = 10.0  # what a connection that was just closed may need to be gone
_PROMPT = "tokens=4"
_BARE = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


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
        "gpu_mib": gpu_memory(),
    }


def gpu_memory() -> int:
    """MiB in use on all GPUs together; 0 without any."""
    if shutil.which("nvidia-smi") is None:
        return 0
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, said.stdout.split()))


def settled(server: FrontEndServer, shm_prefix: str, scratch: Path, before: list[dict[str, int]]) -> dict[str, int]:
    """The census, after the first of them that has no more files, folders and processes than the warmed-up one, or
    after a while.
    """
    deadline = time.monotonic() + _SETTLING_SECONDS
    while True:
        found = census(server, shm_prefix, scratch)
        if (
            len(before) < _WARM_UP
            or time.monotonic() > deadline
            or all(found[name] <= before[_WARM_UP - 1][name] for name in KEPT)
        ):
            return found
        time.sleep(0.1)


def run_reloads(
    folder: Path,
    times: int,
    instances: int = 2,
    options: dict[str, str] | None = None,
    stay: float = 0.0,
    model_py: str | None = None,
) -> dict[str, Any]:
    """The report: `first` is the census after the warm-up, `last` that after the last round; `growth` of resident bytes
    is between them.

    options: of a real model; None: with the fake engine, or a model that is nothing but `model_py`. stay: seconds for
        which the model stays loaded.
    """
    prefix = f"reloads-{time.monotonic_ns()}-"
    arguments = [f"--backend-config=python,shm-region-prefix-name={prefix}"]
    program = (model_py or WITH_FAKE_ENGINE) if options is None else None
    censuses, loads, unloads = [], [], []
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as scratch,
        serving(
            folder,
            instances=instances,
            load=False,
            options=options,
            arguments=arguments,
            scratch=Path(scratch),
            model_py=program,
        ) as server,
    ):
        for _ in range(times):
            started = time.monotonic()
            server.load()
            loads.append(time.monotonic() - started)
            answer = server.ask(
                _PROMPT, stream=True, max_tokens=4, **({} if options is None else {"input_ids": [1, 2, 3]})
            )
            assert answer.error is None and answer.num_finals == 1, answer
            time.sleep(stay)
            unloads.append(server.unload())
            censuses.append(settled(server, prefix, Path(scratch), censuses))
            print(f"{len(censuses)}: {censuses[-1]}", file=sys.stderr, flush=True)
        server.process.terminate()
        exit_code = server.process.wait(40)
    first, last = censuses[min(_WARM_UP, times) - 1], censuses[-1]
    row: dict[str, Any] = {
        "bench": "reloads",
        "times": times,
        "instances": instances,
        "first": first,
        "last": last,
        "exit_code": exit_code,
    }
    row |= {
        "growth": round(last["resident"] / first["resident"] - 1, 4),
        "left": len(list(Path("/dev/shm").glob(f"{prefix}*"))),
    }
    row |= {"load_seconds": round(statistics.median(loads), 2), "unload_seconds": round(statistics.median(unloads), 2)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--instances", type=int, default=2, help="front ends")
    parser.add_argument(
        "--stay",
        type=float,
        default=0,
        metavar="SECONDS",
        help="how long the model stays loaded: after 12 there is a standby engine, too",
    )
    parser.add_argument("--model", default="demo", help="a checkpoint's folder")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the model"
    )
    parser.add_argument("--bare", action="store_true", help="a model of three lines instead")
    args = parser.parse_args()
    options = {"model": args.model} | dict(option.split("=", 1) for option in args.options)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        tempfile.tempdir = folder
        print(
            json.dumps(
                run_reloads(
                    Path(folder) / "server",
                    args.times,
                    args.instances,
                    None if args.bare else options,
                    args.stay,
                    _BARE,
                )
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
