"""The examples of the README and of docs/, run as written against a server on the ports they name.

genai-perf runs only where it is installed (it wants an environment of its own).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_backend.server.launch import Server, ServerSettings
from tests.server.served import served

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
PORTS = {"http_port": 8000, "grpc_port": 8001, "metrics_port": 8002}


def block(page: str, language: str, containing: str) -> str:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [text for kind, text in blocks if kind == language and containing in text]
    return found


def in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if any(in_use(port) for port in PORTS.values()):
        pytest.skip("the README's ports are in use")
    with served(ServerSettings(instances=1, options={"num_pages": 2048}, **PORTS)) as running:
        yield running


def run(command: list[str], folder: Path, **environment: str) -> str:
    activated = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | activated | environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return finished.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the reader stands: a checkout with a virtual environment in it."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "model_repository").symlink_to(ROOT / "model_repository")
    return tmp_path


def test_curl_gets_an_answer_and_a_stream(server: Server, folder: Path) -> None:
    whole, streamed = run(["bash", "-e", "-c", block("README.md", "sh", "curl -sN")], folder).split("data:", 1)
    assert "Once there was a lamp" in whole
    assert streamed.count('"text_output"') > 2


@pytest.mark.parametrize(
    ("page", "containing"),
    [("README.md", "paged_client"), ("docs/reference.md", "start_stream")],
    ids=["paged_client", "tritonclient"],
)
def test_a_python_example_prints_an_answer(server: Server, folder: Path, page: str, containing: str) -> None:
    assert len(run([sys.executable, "-c", block(page, "python", containing)], folder)) > 20


def test_openais_library_and_curl_get_an_answer(server: Server, folder: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    if in_use(9000):
        pytest.skip("the README's port is in use")
    commands = [
        re.findall(r"^paged (openai [^#]*)", block(page, "sh", "paged openai"), re.MULTILINE)
        for page in ("README.md", "docs/openai.md")
    ]
    (command,) = commands[0]
    assert commands[1] == [command]
    gateway = subprocess.Popen(
        [sys.executable, "-m", "paged_client.cli", *command.split()], stdout=subprocess.PIPE, text=True
    )
    try:
        assert gateway.stdout is not None
        assert "http://127.0.0.1:9000/v1" in gateway.stdout.readline()
        called = run([sys.executable, "-c", block("README.md", "python", "from openai")], folder)
        talked = run([sys.executable, "-c", block("docs/openai.md", "python", "while True")], folder).splitlines()
        assert "'get_price'" in called and '{"item": "lantern"}' in called
        assert "get_price" in talked[0] and "24" in talked[-1]
        said = run(["bash", "-e", "-c", block("docs/openai.md", "sh", "chat/completions")], folder)
        assert json.loads(said)["choices"][0]["message"]["content"]
    finally:
        gateway.kill()
        gateway.communicate()


@pytest.mark.long
def test_perf_analyzer_measures_the_streams(server: Server, folder: Path) -> None:
    out = run(["bash", "-e", "-c", block("docs/benchmarking.md", "sh", "perf_analyzer -m")], folder)
    (num_successful,) = map(int, re.findall(r"Successful request count: (\d+)", out))
    # 24, but it counts what ended in its window: on a machine that stood still that is not all
    assert 16 <= num_successful <= 32, out
    requests = json.loads((folder / "perf/profile.json").read_text())["experiments"][0]["requests"]
    assert len(requests) >= num_successful
    assert all(len(request["response_timestamps"]) > 2 for request in requests), out


@pytest.mark.skipif(not shutil.which("genai-perf"), reason="genai-perf is not installed")
def test_genai_perf_measures_the_streams(server: Server, folder: Path) -> None:
    preparation = block("docs/benchmarking.md", "sh", "perf_analyzer -m").split("\necho")[0]
    command = (
        block("docs/benchmarking.md", "sh", ".genai/bin/genai-perf")
        .split("\n", 1)[1]
        .replace(".genai/bin/genai-perf", "genai-perf")
    )
    out = run(["bash", "-e", "-c", f"{preparation}\n{command}"], folder, COLUMNS="200")
    assert "Request Throughput" in out
