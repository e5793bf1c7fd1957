"""`paged bench` and `paged bench memory` as a user runs them, with the real perf_analyzer and a real server of the demo
model.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paged_backend.server import files as server_files
from paged_backend.server.launch import Server, ServerSettings

pytest.importorskip("tritonclient.grpc")
# perf_analyzer may have to be brought first
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(240)]

# A model with the first tensors of NVIDIA's vLLM backend and no others: words of text in, one word a response out, and
# a final response of no text.
FOREIGN_CONFIG = """
name: "paged_llm"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { count: 1 kind: KIND_MODEL } ]
"""
# It takes its time over each, as a model does: responses that chase each other can crash Triton Server 2.51.0 when
# their stream is cancelled.
FOREIGN_MODEL = """
import json
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            asked = json.loads(pb_utils.get_input_tensor_by_name(request, "sampling_parameters").as_numpy()[0])
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0]
            assert asked["ignore_eos"] and text.split()
            for word in ["word"] * asked["max_tokens"]:
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([word], object))]))
                time.sleep(0.005)
            last = pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([""], object))])
            sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the foreign model."""
    model = tmp_path / "repository" / "paged_llm"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(FOREIGN_CONFIG)
    (model / "1" / "model.py").write_text(FOREIGN_MODEL)
    monkeypatch.setattr(server_files, "repository_folder", lambda: tmp_path / "repository")
    with Server(ServerSettings(model="any/model", model_name="foreign", drain_seconds=1)) as server:
        yield server


def bench(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What it printed, and results.json."""
    command = [sys.executable, "-m", "paged_client.cli", "bench", *arguments, "--out", str(folder)]
    finished = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=230, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, json.loads((folder / "results.json").read_text())


@pytest.mark.long
def test_a_sweep_with_a_server_of_its_own_counts_every_token(tmp_path: Path) -> None:
    lengths = ("--input-tokens", "24", "--output-tokens", "60:120", "--shared-prefix", "32")
    printed, results = bench(tmp_path, "-c", "1,6", "-n", "12", "--instances", "1", "--set", "num_pages=512", *lengths)
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 100  # the last names the folder
    assert [run["level"]["streams"] for run in results["runs"]] == [1, 6]
    for run in results["runs"]:
        figures, pool = run["figures"], run["pool"]
        assert (figures["num_requests"], figures["num_errors"]) == (12, 0)
        assert 12 * 60 <= figures["num_tokens"] <= 12 * 120
        assert pool["counters"]["paged_generation_tokens_total"] == figures["num_tokens"], (
            "the server counted other tokens than the client"
        )
        assert pool["counters"]["paged_prefix_cache_hits_total"] >= 11 * 32
        assert 0 < figures["first_token"]["p50"] < figures["latency"]["p50"]
        assert 0 < pool["utilisation"] <= 1
    assert results["runs"][1]["pool"]["running_max"] > 1
    assert {file.name for file in tmp_path.glob("*.png")} == {"throughput_latency.png", "latencies.png", "pool.png"}
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 2
    assert "512 pages" in results["servers"]["started"]


@pytest.mark.long
def test_paging_wastes_less_of_the_same_memory_than_reservation(tmp_path: Path) -> None:
    options = ("--max-model-len", "256", "--pool-sequences", "2", "--rates", "20", "--seconds", "1", "--instances", "1")
    printed, results = bench(tmp_path, "memory", *options)
    reserved, paged = (run["pool"] for run in results["runs"])
    assert (reserved["pages_total"], reserved["page_size"]) == (2, 256)
    assert (paged["pages_total"], paged["page_size"]) == (32, 16)
    assert reserved["running_max"] <= 2 < paged["running_max"]
    assert paged["utilisation"] > 0.8 > 0.7 > reserved["utilisation"]
    assert results["verdict"]["running_ratio"] > 1
    assert "KV memory wasted" in printed
    assert (tmp_path / "memory.png").stat().st_size > 10_000


@pytest.mark.long
def test_speculation_is_measured_beside_a_server_without_it(tmp_path: Path) -> None:
    """Each server has its own page of metrics; the guesses are the first one's alone."""
    drafting, plain = (
        ServerSettings(instances=1, options={"num_pages": 512, "speculation": kind}, drain_seconds=1)
        for kind in ("ngram", "off")
    )
    with Server(drafting) as first, Server(plain) as second:
        ours, theirs = first.addresses, second.addresses
        where = ("--url", ours.grpc_url, "--metrics-url", ours.metrics_url)
        other = ("--against", theirs.grpc_url, "--against-metrics-url", theirs.metrics_url)
        load = ("-c", "2", "-n", "8", "--input-tokens", "24", "--output-tokens", "120")
        printed, results = bench(tmp_path, *where, *other, *load)
    assert [run["target"] for run in results["runs"]] == ["paged_llm", "paged_llm (2)"]
    fast, slow = results["runs"]
    for run in (fast, slow):
        assert (run["figures"]["num_requests"], run["figures"]["num_errors"]) == (8, 0)
        assert run["pool"]["counters"]["paged_generation_tokens_total"] == run["figures"]["num_tokens"] == 8 * 120
    counters = fast["pool"]["counters"]
    assert counters["paged_drafts_proposed_total"] >= counters["paged_drafts_accepted_total"] > 0
    assert not slow["pool"]["counters"].get("paged_drafts_proposed_total")
    (ratio,) = results["ratios"]
    expected = fast["figures"]["tokens_per_second"] / slow["figures"]["tokens_per_second"]
    assert ratio["tokens_per_second"] == pytest.approx(expected)
    assert "paged_llm against paged_llm (2)" in printed and "mean accepted" in printed


def test_a_model_of_the_vllm_backends_tensors_is_measured_by_text_and_against_another(
    tmp_path: Path, foreign: Server
) -> None:
    address = foreign.addresses
    where = (
        "--url",
        address.grpc_url,
        "--metrics-url",
        address.metrics_url,
        "--model-name",
        "foreign",
        "--against",
        address.grpc_url,
    )
    printed, results = bench(
        tmp_path / "out", *where, "-c", "2", "--input-tokens", "8", "--output-tokens", "5", "--no-warm-up"
    )
    assert [run["target"] for run in results["runs"]] == ["foreign", "foreign (2)"]
    for run in results["runs"]:
        assert (run["figures"]["num_requests"], run["figures"]["num_errors"]) == (8, 0)
        assert (run["figures"]["num_tokens"], run["figures"]["num_responses"]) == (8 * 5, 8 * 5), (
            "the final response of no text counts as none"
        )
    assert len(results["ratios"]) == 1
    assert results["counting"].startswith("Tokens are not counted")
    assert results["prompting"].startswith("Prompts go as text")
    assert "foreign against foreign (2)" in printed
