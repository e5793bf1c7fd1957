"""What a response costs in Triton Server: responses a second and CPU time for each, of a model that does nothing but
send. Prints a JSON line a setting.

    python -m tests.bench.bench_sends [--streams 256] [--responses 256] [--quick]

The settings are those that a deployment can choose: front ends (model instances), sending threads in each, bytes of a
response, the Python backend's thread-pool-size and the size of its shared-memory region. Each starts a server of its
own; perf_analyzer reads --streams gRPC streams of --responses responses each. cpu_us is time of all cores spent by the
server and its stubs, over the number of responses: it does not depend on what else runs, while responses a second does,
most of all on few cores, where perf_analyzer competes with the server.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from paged_backend.server import files as server_files
from paged_backend.server.ports import PortClaim
from paged_client.bench.load import Level, LoadLimits, Prompting, run_load
from paged_client.bench.perf_analyzer import PerfAnalyzer, find_perf_analyzer
from paged_client.bench.target import Target
from paged_client.bench.workload import Span, Workload, make_requests
from tests.bench.yardstick import print_row

_MODEL = "paged_llm"
_START_SECONDS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_MODEL_PY = """
import json, queue, threading
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.text = np.array([b"x" * int(parameters["response_bytes"]["string_value"])], np.object_)
        self.queues = [queue.SimpleQueue() for _ in range(int(parameters["senders"]["string_value"]))]
        self.turn = 0
        for waiting in self.queues:
            threading.Thread(target=self.send, args=(waiting,), daemon=True).start()

    def execute(self, requests):
        for request in requests:
            asked = next(tensor.as_numpy()[0] for tensor in request.inputs() if tensor.name() == "sampling_parameters")
            queue = self.queues[self.turn % len(self.queues)]
            queue.put((request.get_response_sender(), json.loads(asked)["max_tokens"]))
            self.turn += 1

    def send(self, waiting):  # a piece of each request in turn, as an engine's step brings them
        while True:
            sender, left = waiting.get()
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if left == 1 else 0
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", self.text)]), flags=flags)
            if left > 1:
                waiting.put((sender, left - 1))
            del sender
"""


@dataclass(frozen=True)
class Setting:
    """0: as Triton Server has it by default."""

    front_ends: int = 4
    senders: int = 4
    response_bytes: int = 8
    thread_pool_size: int = 0
    shm_mib: int = 0


SETTINGS = (
    *(
        Setting(front_ends, senders)
        for front_ends, senders in ((1, 1), (1, 4), (1, 8), (2, 4), (4, 1), (4, 2), (4, 4), (8, 4))
    ),
    *(Setting(response_bytes=size) for size in (64, 512, 4096)),
    *(Setting(thread_pool_size=size) for size in (1, 4, 16)),
    Setting(shm_mib=64),
)
QUICK = (Setting(1, 1), Setting(4, 4))


@contextmanager
def serving(setting: Setting) -> Iterator[tuple[str, int]]:
    """(gRPC address, pid) of a server with the sending model."""
    with tempfile.TemporaryDirectory(prefix="paged-sends-") as name:
        folder = Path(name)
        installation = server_files.find_installation()
        options = {"senders": str(setting.senders), "response_bytes": str(setting.response_bytes)}
        repository = server_files.prepare_repository(
            folder, model_name=_MODEL, options=options, instances=setting.front_ends
        )
        version = repository / _MODEL / "1"
        version.unlink()
        version.mkdir()
        (version / "model.py").write_text(_MODEL_PY)
        backend = [f"thread-pool-size={setting.thread_pool_size}"] * (setting.thread_pool_size > 0)
        backend += [f"shm-default-byte-size={setting.shm_mib * 2**20}"] * (setting.shm_mib > 0)
        ports = PortClaim("127.0.0.1", http=0, grpc=0, metrics=0)
        command = [
            *(
                str(installation.executable),
                f"--model-repository={repository}",
                "--disable-auto-complete-config",
                "--exit-timeout-secs=5",
            ),
            f"--backend-directory={server_files.prepare_backends(installation, folder)}",
            *(f"--backend-config=python,{each}" for each in backend),
            *(f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")),
            *(
                f"--{service}-port={getattr(ports.addresses, f'{service}_port')}"
                for service in ("http", "grpc", "metrics")
            ),
        ]
        environment = server_files.prepare_environment(installation, folder)
        with (folder / "server.log").open("wb") as log:
            ports.release()
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                _wait_until_ready(ports.addresses.grpc_url, server, folder / "server.log")
                yield ports.addresses.grpc_url, server.pid
            finally:
                server.terminate()
                server.wait(30)


def _wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with grpc.InferenceServerClient(address) as client:
        while True:
            try:
                if client.is_model_ready(_MODEL, client_timeout=1.0):
                    return
            except InferenceServerException:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)


def cpu_seconds(parent: int) -> float:
    """Of a process and its children."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.parent.name, stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(pid) == parent or int(rest[1]) == parent:
            total += (int(rest[11]) + int(rest[12])) / _TICKS
    return total


def measure(
    tool: PerfAnalyzer, setting: Setting, num_streams: int, num_responses: int, rounds: int
) -> dict[str, float]:
    with serving(setting) as (address, server):
        target = Target("sends", address, _MODEL, None, takes_ids=False, counts_tokens=False, counts_prompts=False)
        workload = Workload(Span(4, 4), Span(num_responses, num_responses))
        limits = LoadLimits(None, 300.0, len(os.sched_getaffinity(0)))
        prompting = Prompting(as_ids=False, tokens_per_word=1.0, count_tokens=False)
        before = cpu_seconds(server)
        traces = run_load(
            tool,
            target,
            Level(num_streams),
            workload,
            make_requests(workload, num_streams * rounds),
            prompting,
            limits,
            lambda: None,
        )
        spent = cpu_seconds(server) - before
    arrivals = np.sort(np.concatenate([trace.arrivals for trace in traces]))
    if len(arrivals) != num_streams * rounds * num_responses:
        raise SystemExit(f"{len(arrivals)} responses came, {num_streams * rounds * num_responses} were sent")
    first = np.percentile([(trace.arrivals[0] - trace.sent) / 1e6 for trace in traces], [50, 90, 99])
    return {
        "responses_per_second": round((len(arrivals) - 1) / (arrivals[-1] - arrivals[0]) * 1e9),
        "cpu_us": round(spent / len(arrivals) * 1e6, 1),
        **{
            f"first_response_ms_{name}": round(float(ms), 2)
            for name, ms in zip(("p50", "p90", "p99"), first, strict=True)
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--streams", type=int, default=256, help="gRPC streams at once")
    options.add_argument("--responses", type=int, default=256, help="responses a stream")
    options.add_argument("--rounds", type=int, default=2, help="requests of each stream")
    options.add_argument("--quick", action="store_true", help="two settings instead of all")
    chosen = options.parse_args(arguments)
    tool = find_perf_analyzer(lambda line: None)
    for setting in QUICK if chosen.quick else SETTINGS:
        measured = measure(tool, setting, chosen.streams, chosen.responses, chosen.rounds)
        print_row({"bench": "sends", **asdict(setting), "streams": chosen.streams, **measured})


if __name__ == "__main__":
    main()
