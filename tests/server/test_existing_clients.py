"""Clients that others wrote, against a real tritonserver and the gateway before it. Each is run where it is installed:
its command must be on PATH, and may live in a virtual environment of its own (LiteLLM pins a version of `openai`,
genai-perf one of NumPy).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

from paged_backend.config import demo_model_folder
from paged_backend.errors import EngineError
from paged_backend.server.launch import Server, ServerSettings
from paged_client import PagedClient
from paged_client.bench.perf_analyzer import find_perf_analyzer
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

LITELLM = shutil.which("litellm")
GENAI_PERF = shutil.which("genai-perf")
AIPERF = shutil.which("aiperf")
PROMPT = "Once upon a time there was a clever baker called Mira. One day she"
TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"""
_LITELLM_SCRIPT = """
import json, sys
import litellm
asked = json.loads(sys.argv[1])
if asked.get("stream"):
    print(json.dumps("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked))))
else:
    print(json.dumps(litellm.completion(**asked).choices[0].message.content))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "talker"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    with served(
        ServerSettings(model=str(checkpoint), instances=1, options={"num_pages": 200, "dtype": "float32"})
    ) as running:
        yield running


@pytest.fixture(scope="module")
def base_url(server: Server) -> Iterator[str]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "paged_client.cli", "openai", "-u", server.addresses.grpc_url, "-p", "0"]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert gateway.stdout is not None
        yield next(word.rstrip(",") for word in gateway.stdout.readline().split() if word.startswith("http"))
    finally:
        gateway.kill()
        gateway.communicate()


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    with PagedClient(server.addresses.grpc_url) as client:
        return client.generate(PROMPT, temperature=0, max_tokens=20).text


def by_litellm(**asked: Any) -> str:
    assert LITELLM is not None
    python = Path(LITELLM).parent / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True"
    }
    asked |= {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "temperature": 0}
    finished = subprocess.run(
        [python, "-c", _LITELLM_SCRIPT, json.dumps(asked)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    said: str = json.loads(finished.stdout.splitlines()[-1])
    return said


@pytest.mark.skipif(LITELLM is None, reason="litellm is not installed")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_litellm_asks_triton_server_itself(server: Server, expected: str, stream: bool) -> None:
    url = f"{server.addresses.http_url}/v2/models/paged_llm/generate"
    said = by_litellm(model="triton/paged_llm", api_base=url, stream=stream, allowed_openai_params=["temperature"])
    assert said == (expected if stream else PROMPT + expected), (
        "unstreamed, the vLLM backend puts the prompt before the answer, and so do we"
    )


@pytest.mark.skipif(LITELLM is None, reason="litellm is not installed")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_litellm_asks_the_gateway(base_url: str, expected: str, stream: bool) -> None:
    assert by_litellm(model="openai/paged_llm", api_base=base_url, api_key="none", stream=stream) == expected


@pytest.mark.skipif(GENAI_PERF is None, reason="genai-perf is not installed")
@pytest.mark.parametrize("kind", ["the vLLM backend", "completions", "chat"])
def test_genai_perf_measures(server: Server, base_url: str, kind: str, tmp_path: Path) -> None:
    assert GENAI_PERF is not None
    try:
        perf_analyzer = find_perf_analyzer(print)
    except EngineError as error:
        pytest.skip(str(error))
    where = {"the vLLM backend": ["--backend", "vllm", "-u", server.addresses.grpc_url]}.get(
        kind, ["--endpoint-type", kind, "-u", base_url.removesuffix("/v1"), "--extra-inputs", "ignore_eos:true"]
    )
    load = [
        "--synthetic-input-tokens-mean",
        "32",
        "--output-tokens-mean",
        "16",
        "--num-dataset-entries",
        "4",
        "--concurrency",
        "2",
        "--request-count",
        "6",
    ]
    command = [
        GENAI_PERF,
        "profile",
        "-m",
        "paged_llm",
        "--streaming",
        "--tokenizer",
        str(demo_model_folder()),
        *where,
        *load,
    ]
    path = os.pathsep.join([str(perf_analyzer.executable.parent), os.environ["PATH"]])
    environment = {name: value for name, value in perf_analyzer.environment.items() if name != "PYTHONPATH"} | {
        "PATH": path
    }
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    (report,) = tmp_path.glob("artifacts/*/profile_export_genai_perf.json")
    measured = json.loads(report.read_text())
    assert measured["request_count"]["avg"] == 6
    assert measured["output_sequence_length"]["avg"] > 8
    assert measured["time_to_first_token"]["avg"] > 0


@pytest.mark.skipif(AIPERF is None, reason="aiperf is not installed")
@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_aiperf_loads_the_gateway(base_url: str, kind: str, tmp_path: Path) -> None:
    assert AIPERF is not None
    usage = ["--use-server-token-count", *(["--per-chunk-usage"] if kind == "chat" else [])]
    load = [
        "--synthetic-input-tokens-mean",
        "32",
        "--output-tokens-mean",
        "16",
        "--concurrency",
        "16",
        "--request-count",
        "64",
    ]
    where = [
        "--endpoint-type",
        kind,
        "-u",
        base_url.removesuffix("/v1"),
        "--extra-inputs",
        "ignore_eos:true",
        "--artifact-dir",
        str(tmp_path),
    ]
    command = [
        AIPERF,
        "profile",
        "-m",
        "paged_llm",
        "--streaming",
        "--tokenizer",
        str(demo_model_folder()),
        *where,
        *load,
        *usage,
        "--ui",
        "none",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    measured = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == 64
    assert "error_request_count" not in measured or not measured["error_request_count"]["avg"]
    assert measured["output_sequence_length"]["avg"] == 16
    assert measured["time_to_first_token"]["avg"] > 0
