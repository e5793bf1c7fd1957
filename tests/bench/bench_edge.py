"""What a token costs in a Triton Server between the engine and the callers: processor time of the front ends (the
server's stub processes) and of the server itself. Prints a JSON line for each number of streams.

    python -m tests.bench.bench_edge --streams 64 256 --tokens 128 --step-ms 20

The engine is a stand-in (paced_engine.py): every step brings each stream a token of the embedded model's vocabulary.
perf_analyzer reads the streams over gRPC, --rounds requests each. front_end_us, server_us: processor time for a token,
user and system together, of what runs between the first request and the last response; front_end_loops: the former in
turns of a Python loop (yardstick.py). responses: of so many tokens each was a response; where senders fall behind they
join some. Where the processors are busy the wall's figures mean nothing, and these still do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import paged_backend
from paged_client.bench.load import Level, LoadLimits, Prompting, run_load
from paged_client.bench.perf_analyzer import PerfAnalyzer, find_perf_analyzer
from paged_client.bench.target import Target
from paged_client.bench.workload import Span, Workload, make_requests
from tests.bench import paced_engine
from tests.bench.yardstick import print_row, python_loops
from tests.server.front_end_server import MODEL, FrontEndServer, serving

_TICKS = os.sysconf("SC_CLK_TCK")


def model_py(step_ms: float) -> str:
    """The model's program: this tree's front end, whatever tree the server's Python environment has, and the paced
    engine behind it.
    """
    paths = [str(Path(paged_backend.__file__).parent.parent)]
    engine = f"import sys, runpy; sys.path[:0] = {paths!r}; runpy.run_path({paced_engine.__file__!r}, None, '__main__')"
    command = [sys.executable, "-c", engine, f"{paced_engine.STEP_OPTION}{step_ms}"]
    return f"""
import sys

sys.path[:0] = {paths!r}
from paged_backend.frontend import triton_io


class TritonPythonModel(triton_io.TritonPythonModel):
    engine_command = {command!r}
"""


def cpu_seconds(pid: int) -> float:
    """Of one process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(
    tool: PerfAnalyzer, server: FrontEndServer, num_streams: int, num_tokens: int, rounds: int
) -> dict[str, object]:
    target = Target("edge", server.grpc, MODEL, None, takes_ids=False, counts_tokens=True, counts_prompts=False)
    workload = Workload(Span(4, 4), Span(num_tokens, num_tokens))
    limits = LoadLimits(None, 300.0, len(os.sched_getaffinity(0)))
    prompting = Prompting(as_ids=False, tokens_per_word=1.0, count_tokens=True)
    requests = make_requests(workload, num_streams * rounds)
    stubs, tokens = server.stub_pids(), len(requests) * num_tokens

    def spent() -> tuple[float, float]:
        return sum(cpu_seconds(pid) for pid in stubs), cpu_seconds(server.process.pid)

    before = spent()
    traces = run_load(tool, target, Level(num_streams), workload, requests, prompting, limits, lambda: None)
    front_end_us, server_us = ((now - then) / tokens * 1e6 for then, now in zip(before, spent(), strict=True))
    return {
        "bench": "edge",
        "front_ends": len(stubs),
        "streams": num_streams,
        "tokens": num_tokens,
        "front_end_us": round(front_end_us, 2),
        "front_end_loops": round(front_end_us * python_loops()),
        "server_us": round(server_us, 2),
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
        folder = Path(name)
        with serving(folder, instances=args.front_ends, model_py=model_py(args.step_ms)) as server:
            for streams in args.streams:
                row = measure(tool, server, streams, args.tokens, args.rounds)
                print_row({**row, "step_ms": args.step_ms})
                time.sleep(0.5)


if __name__ == "__main__":
    main()
