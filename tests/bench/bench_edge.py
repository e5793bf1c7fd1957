"""What a token costs in a Triton Server between the engine and the callers: processor time of the front ends (the
server's stub processes) and of the server itself. Prints a JSON line for each number of streams.

    python -m tests.bench.bench_edge --streams 1 64 256 --tokens 128 --step-ms 20

The engine is a stand-in (paced_engine.py): every step brings each stream a token of the embedded model's vocabulary.
perf_analyzer reads the streams over gRPC, --rounds requests each. front_end_us, server_us: processor time for a token,
user and system together, of what runs between the first request and the last response; front_end_loops: the former in
turns of a Python loop (yardstick.py). parts: of front_end_us, by the front end's threads: `send`, `engine-receive`
(messages to pieces of text), `cancel` (asks who has left), `metrics`, `MainThread` (takes requests), and `library`,
those of the server's library and of ZeroMQ. responses: of so many tokens each was a response; where senders fall behind
they join some. Where the processors are busy the wall's figures mean nothing, and these still do.

first_ms: from perf_analyzer's request to the first response, p50 and p90. With one stream the stand-in answers at once,
so that this is what a first token costs beside the engine.

bare: the yardstick, what Triton Server takes for as many responses of a model that does nothing but send (bench_sends):
its cpu_us is that of server and front ends together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import paged_backend
from paged_client.bench.load import Level, LoadLimits, Prompting, run_load
from paged_client.bench.perf_analyzer import PerfAnalyzer, find_perf_analyzer
from paged_client.bench.target import Target
from paged_client.bench.workload import Span, Workload, make_requests
from tests.bench import bench_sends, paced_engine
from tests.bench.yardstick import print_row, python_loops
from tests.server.front_end_server import MODEL, FrontEndServer, serving

_TICKS = os.sysconf("SC_CLK_TCK")


def model_py(step_ms: float, names: Path) -> str:
    """The model's program: this tree's front end, whatever tree the server's Python environment has, and the paced
    engine behind it. names: of a folder, where each front end writes what its threads are called.
    """
    paths = [str(Path(paged_backend.__file__).parent.parent)]
    engine = f"import sys, runpy; sys.path[:0] = {paths!r}; runpy.run_path({paced_engine.__file__!r}, None, '__main__')"
    command = [sys.executable, "-c", engine, f"{paced_engine.STEP_OPTION}{step_ms}"]
    return f"""
import json, os, sys, threading

sys.path[:0] = {paths!r}
from paged_backend.frontend import triton_io


class TritonPythonModel(triton_io.TritonPythonModel):
    engine_command = {command!r}

    def initialize(self, args):
        super().initialize(args)
        names = {{thread.native_id: thread.name for thread in threading.enumerate()}}
        with open(os.path.join({str(names)!r}, str(os.getpid())), "w") as file:
            json.dump(names, file)
"""


def cpu_seconds(pid: int) -> float:
    """Of one process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def thread_seconds(pid: int, names: Path) -> Counter[str]:
    """Processor time of a front end's threads by their names."""
    called = json.loads((names / str(pid)).read_text())
    seconds: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds = int((task / "schedstat").read_text().split()[0])
        name = called.get(task.name, "library")
        seconds["send" if name.startswith("send-") else name] += nanoseconds / 1e9  # type: ignore[assignment]
    return seconds


def measure(
    tool: PerfAnalyzer, server: FrontEndServer, names: Path, num_streams: int, num_tokens: int, rounds: int
) -> dict[str, object]:
    target = Target("edge", server.grpc, MODEL, None, takes_ids=False, counts_tokens=True, counts_prompts=False)
    workload = Workload(Span(4, 4), Span(num_tokens, num_tokens))
    limits = LoadLimits(None, 300.0, len(os.sched_getaffinity(0)))
    prompting = Prompting(as_ids=False, tokens_per_word=1.0, count_tokens=True)
    requests = make_requests(workload, num_streams * rounds)
    stubs, tokens = server.stub_pids(), len(requests) * num_tokens

    def of_front_ends() -> Counter[str]:
        return sum((thread_seconds(pid, names) for pid in stubs), Counter())

    before, server_before = of_front_ends(), cpu_seconds(server.process.pid)
    traces = run_load(tool, target, Level(num_streams), workload, requests, prompting, limits, lambda: None)
    parts = {name: seconds / tokens * 1e6 for name, seconds in (of_front_ends() - before).most_common()}
    server_us = (cpu_seconds(server.process.pid) - server_before) / tokens * 1e6
    front_end_us = sum(parts.values())
    first_ms = np.percentile([(int(trace.arrivals[0]) - trace.sent) / 1e6 for trace in traces], [50, 90])
    return {
        "bench": "edge",
        "front_ends": len(stubs),
        "streams": num_streams,
        "tokens": num_tokens,
        "front_end_us": round(front_end_us, 2),
        "front_end_loops": round(front_end_us * python_loops()),
        "parts": {name: round(us, 2) for name, us in parts.items() if us >= 0.01},
        "server_us": round(server_us, 2),
        "first_ms": {"p50": round(float(first_ms[0]), 3), "p90": round(float(first_ms[1]), 3)},
        "responses": round(sum(len(trace.arrivals) for trace in traces) / tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the engine: a token for each stream")
    parser.add_argument("--front-ends", type=int, default=1)
    args = parser.parse_args()
    tool = find_perf_analyzer(lambda line: None)
    with tempfile.TemporaryDirectory(prefix="paged-edge-") as name:
        folder, names = Path(name), Path(name, "threads")
        names.mkdir()
        with serving(folder, instances=args.front_ends, model_py=model_py(args.step_ms, names)) as server:
            for streams in args.streams:
                row = measure(tool, server, names, streams, args.tokens, args.rounds)
                bare = bench_sends.measure(
                    tool, bench_sends.Setting(args.front_ends), streams, args.tokens, args.rounds
                )
                print_row({**row, "step_ms": args.step_ms, "bare": bare})


if __name__ == "__main__":
    main()
