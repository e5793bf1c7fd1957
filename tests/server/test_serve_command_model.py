"""`paged demo` and `paged serve` with the model that comes with paged, and with checkpoints that only the engine can refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paged_backend.config import demo_model_folder

pytest.importorskip("tritonclient.grpc")
pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`paged …` to its end; `folder` is where it keeps temporary files."""
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-m", "paged_client.cli", *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_demo_streams_words_and_tells_what_the_pool_held(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    finished = run(temporary, "demo", "--prompt", "Once upon a time", "--max-tokens", "80")
    assert finished.returncode == 0, finished.stderr
    answer, *report = finished.stdout.rsplit("\n\n", 1)
    assert answer.startswith("Once upon a time ")
    words = re.findall(r"[A-Za-z]+", answer)
    assert len(words) >= 30
    assert {"the", "and"} & set(words)
    assert re.search(r"\d+ tokens: the first after \d+ ms, then \d+ tokens/s\n", report[0])
    assert re.search(r"pool: [1-9]\d* pages of 16 tokens; .* cached now", report[0])
    assert all(line.startswith("paged: ") for line in finished.stderr.splitlines()), finished.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut short", "another architecture"])
def test_a_checkpoint_that_only_the_engine_can_refuse_is_one_sentence(tmp_path: Path, damage: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_model_folder(), checkpoint)
    if damage == "cut short":
        weights = checkpoint / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    temporary = tmp_path / "temporary"
    finished = run(temporary, "serve", f"--model={checkpoint}", "--http-port=0", "--grpc-port=0", "--metrics-port=0")
    assert (finished.returncode, finished.stdout) == (1, "")
    (sentence,) = [line for line in finished.stderr.splitlines() if "error" in line]
    assert re.match("paged: error: .*(model.safetensors|NoSuchForCausalLM)", sentence)
    assert "Traceback" not in finished.stderr
    assert list(temporary.iterdir()) == []
