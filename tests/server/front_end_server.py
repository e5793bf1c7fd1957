"""A real tritonserver whose model has the fake engine behind its front ends."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.process_id import ProcessId
from paged_backend.server import files as server_files

MODEL = "paged_llm"
_ATTEMPTS = 3
FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
WITH_FAKE_ENGINE = f"""
from paged_backend.frontend import triton_io


class TritonPythonModel(triton_io.TritonPythonModel):
    engine_command = [{sys.executable!r}, {str(FAKE_ENGINE)!r}]
"""


@dataclass
class Answer:
    """Everything a client got for one request."""

    texts: list[str] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    error: InferenceServerException | None = None
    num_finals: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)


class FrontEndServer:
    def __init__(self, process: subprocess.Popen[bytes], log: Path, ports: list[int]) -> None:
        self.process = process
        self.log = log
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)

    def wait_until_live(self) -> None:
        with closing(grpc.InferenceServerClient(self.grpc)) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if client.is_server_live() and self._answers_metrics():
                        return
                except InferenceServerException:
                    pass
                assert self.process.poll() is None, self.log.read_text(errors="replace")
                assert time.monotonic() < deadline, self.log.read_text(errors="replace")
                time.sleep(0.05)

    def _answers_metrics(self) -> bool:
        """The server opens this port last, after gRPC's and HTTP's."""
        try:
            self.scrape()
        except OSError:
            return False
        return True

    def load(self) -> None:
        with closing(grpc.InferenceServerClient(self.grpc)) as client:
            client.load_model(MODEL)

    def unload(self) -> float:
        """Seconds until the model is gone."""
        started = time.monotonic()
        with closing(grpc.InferenceServerClient(self.grpc)) as client:
            client.unload_model(MODEL)
            while self.state() != "unloaded":
                assert time.monotonic() < started + 40, "the model does not unload"
                time.sleep(0.05)
        return time.monotonic() - started

    def state(self) -> str:
        with closing(grpc.InferenceServerClient(self.grpc)) as client:
            (model,) = client.get_model_repository_index(as_json=True)["models"]
            return model.get("reason") or model.get("state", "")

    def scrape(self) -> dict[str, float]:
        """Series of /metrics by name and labels, without model and version."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        series = {}
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                series[re.sub(r'(model|version)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")] = float(
                    value
                )
        return series

    def wait_for(self, series: str, value: float, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while self.scrape().get(series) != value:
            assert time.monotonic() < deadline, f"{series} is {self.scrape().get(series)}, not {value}"
            time.sleep(0.05)

    def wait_until_counted(self) -> dict[str, float]:
        """Until nothing runs and the numbers of all requests that ended have been published; the numbers."""
        deadline = time.monotonic() + 20
        before = self.scrape()
        while True:
            time.sleep(0.8)
            after = self.scrape()
            changing = [
                name for name, value in after.items() if name.startswith("paged_requests") and before.get(name) != value
            ]
            if after.get('paged_requests{state="running"}', 0) == 0 and not changing:
                return after
            assert time.monotonic() < deadline, f"still changing: {changing}"
            before = after

    def engine_pids(self) -> list[int]:
        """Engine processes of this server's front ends."""
        return [pid for pid, _ in self._engines()]

    def socket_folder(self) -> Path:
        """Of the one engine that runs."""
        ((_, arguments),) = self._engines()
        return Path(arguments.split()[-1]).parent

    def stub_pids(self) -> set[int]:
        """The front ends' processes."""
        return {int(pid) for pid, parent, _ in _processes() if int(parent) == self.process.pid}

    def _engines(self) -> list[tuple[int, str]]:
        rows = _processes()
        stubs = {int(pid) for pid, parent, _ in rows if int(parent) == self.process.pid}
        return [
            (int(pid), arguments)
            for pid, parent, arguments in rows
            if int(parent) in stubs and "fake_engine" in arguments
        ]

    def ask(self, prompt: str, *, stream: bool = True, **options: Any) -> Answer:
        return self.ask_all([prompt], stream=stream, **options)[0]

    def ask_all(self, prompts: list[str], *, seconds: float = 60, **options: Any) -> list[Answer]:
        """Asks at once over one gRPC stream and waits for every answer's final response."""
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        answers = [Answer() for _ in prompts]
        with closing(grpc.InferenceServerClient(self.grpc)) as client:
            client.start_stream(lambda result, error: arrived.put((result, error)))
            for number, prompt in enumerate(prompts):
                send(client, prompt, request_id=str(number), **options)
            deadline = time.monotonic() + seconds
            while any(not answer.num_finals for answer in answers):
                take(arrived.get(timeout=deadline - time.monotonic()), answers)
            client.stop_stream()
            while not arrived.empty():
                take(arrived.get(), answers)
        return answers


def take(arrival: tuple[Any, Any], answers: list[Answer]) -> None:
    result, error = arrival
    if error is not None:
        number = re.search(r"request id: (\d+)", str(error))
        answer = answers[int(number[1]) if number else 0]
        answer.error = error
        answer.num_finals += 1
        return
    response = result.get_response()
    answer = answers[int(response.id)]
    answer.num_finals += response.parameters["triton_final_response"].bool_param
    if result.as_numpy("text_output") is not None:
        answer.texts.append(result.as_numpy("text_output")[0].decode())
        answer.results.append(result)


_TYPES = {
    "max_tokens": "INT32",
    "top_k": "INT32",
    "input_ids": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "seed": "UINT64",
}
_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_, "BYTES": np.object_}


def tensors(**values: Any) -> list[grpc.InferInput]:
    """Inputs by name: a bool, number, string, bytes, or list of them."""
    inputs = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        kind = _TYPES.get(name) or ("BOOL" if isinstance(value, bool) else "BYTES")
        array = np.array([item.encode() if isinstance(item, str) else item for item in items], _NUMPY[kind])
        inputs.append(grpc.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
    return inputs


def send(
    client: grpc.InferenceServerClient,
    prompt: str,
    *,
    request_id: str = "0",
    parameters: Mapping[str, Any] | None = None,
    **values: Any,
) -> None:
    given = {"text_input": prompt, **values} if "input_ids" not in values else values
    client.async_stream_infer(
        MODEL,
        tensors(**given),
        request_id=request_id,
        enable_empty_final_response=True,
        parameters=dict(parameters or {}),
    )


@contextmanager
def serving(
    folder: Path,
    *,
    instances: int = 1,
    load: bool = True,
    options: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    scratch: Path | None = None,
    model_py: str | None = WITH_FAKE_ENGINE,
    stub_exits: Path | None = None,
    wait: bool = True,
) -> Iterator[FrontEndServer]:
    """Starts a server in `folder`, with the model loaded unless `load` says no. It is killed at the end, unless the
    test has stopped it: a stop takes three to six seconds, most of them Triton Server's naps.

    arguments: more of tritonserver's. scratch: its folder for temporary files. model_py: the model's program; None: the
    shipped one, and `options` names the checkpoint. stub_exits: where each stub's exit status is to be written, a line
    each; then the stubs' parent is a shell, so there is one instance. wait: until the server is live.
    """
    folder.mkdir(exist_ok=True, parents=True)
    installation = server_files.find_installation()
    backends = server_files.prepare_backends(installation, folder)
    if stub_exits is not None:
        assert instances == 1
        _note_exits(backends / "python" / "triton_python_backend_stub", stub_exits)
    environment = server_files.prepare_environment(installation, folder) | (
        {} if scratch is None else {"TMPDIR": str(scratch)}
    )
    defaults = {"model": "fake", "standby_engine": "false"} if model_py is not None else {}
    repository = server_files.prepare_repository(
        folder, model_name=MODEL, options={**defaults, **(options or {})}, instances=instances
    )
    version = repository / MODEL / "1"
    if model_py is not None:
        version.unlink()
        version.mkdir()
        (version / "model.py").write_text(model_py)
    ports = _free_ports(3)
    command = [
        str(installation.executable),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        *(f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        *([f"--load-model={MODEL}"] if load else []),
        *arguments,
    ]
    server = _started(command, environment, folder / "server.log", ports, wait)
    process = server.process
    try:
        yield server
    finally:
        stubs = [stub for pid in server.stub_pids() if (stub := ProcessId.of(pid)) is not None]
        process.kill()
        process.wait()
        _wait_for_exits(stubs)  # they remove what they shared with it
        shutil.rmtree(folder / "repository", ignore_errors=True)


def _wait_for_exits(processes: Collection[ProcessId]) -> None:
    """At most 10 s; then they are killed: no test is about how they end."""
    deadline = time.monotonic() + 10
    for process in processes:
        while process.alive:
            if time.monotonic() > deadline:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)


def _started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, ports: list[int], wait: bool
) -> FrontEndServer:
    """Tries again where tritonserver aborts: 2.51.0 does on an overloaded machine, while its stubs start."""
    for attempt in range(1, _ATTEMPTS + 1):
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        server = FrontEndServer(process, log, ports)
        try:
            if wait:
                server.wait_until_live()
            return server
        except AssertionError:
            process.kill()
            if process.wait() != -signal.SIGABRT or attempt == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _processes() -> list[list[str]]:
    """[pid, parent's pid, command] of every process."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    return [line.split(None, 2) for line in listing]


def _note_exits(stub: Path, file: Path) -> None:
    """Puts a shell between the server and the stub: the server tells nobody how its children ended. Without arguments
    it is only tried out.
    """
    program = stub.resolve()
    stub.unlink()
    stub.write_text(f'#!/bin/sh\n"{program}" "$@"\nstatus=$?\n[ $# -eq 0 ] || echo $status >> "{file}"\nexit $status\n')
    stub.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    sockets = [socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
