"""Cards that are not here: what the steps of a model launch compiles for them, and has room there. Nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CARDS = {  # capability, KiB of shared memory that a program may have
    "A100": ("8.0", "163"),
    "A10": ("8.6", "99"),
    "L4": ("8.9", "99"),
    "H100": ("9.0", "227"),
    "B200": ("10.0", "227"),
    "RTX 5090": ("12.0", "99"),
}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench.compile_step", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def compiled(card: str, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of tests/bench/compile_step.py, and its sums."""
    capability, shared = CARDS[card]
    said = run("--capability", capability, "--shared-kib", shared, *options)
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    *rows, sums = map(json.loads, said.stdout.splitlines())
    assert sums["variants"] == len(rows) > 0 == sums["errors"]
    return rows, sums


@pytest.mark.long
def test_where_there_is_less_shared_memory_pipelines_have_fewer_stages() -> None:
    rows, _ = compiled("L4", "--kernels", "small_linear", "--set", "max_num_sequences=2")
    assert all(row["shared_kib"] <= 99 and not row["spilled"] for row in rows)
    assert any(row.get("stages", 9) < row["constants"].get("STAGES", 0) for row in rows)


@pytest.mark.long
def test_what_brings_rows_up_to_date_is_compiled_too() -> None:
    rows, _ = compiled("A10", "--kernels", "_update", "--set", "max_num_sequences=2")
    assert {"row_update._write_spans_kernel", "row_update._update_page_tables_kernel"} <= {
        row["kernel"] for row in rows
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--capability", "7.5"), "no kernels compute such a model there: plain torch does"),
        (("--set", "pagesize=16"), "unknown parameter 'pagesize': did you mean 'page_size'?"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_a_sentence(options: tuple[str, ...], sentence: str) -> None:
    said = run(*options)
    assert said.returncode == 2 and not said.stdout and "Traceback" not in said.stderr
    assert said.stderr.splitlines()[-1].startswith(f"compile_step.py: error: {sentence}")


MODELS = {
    "dense": ("llama-3.1-8b",),
    "int4": ("llama-3.1-8b", "--set", "quantization=int4"),
    "fp8": ("llama-3.1-8b", "--set", "quantization=fp8"),
    "adapters, drafts": ("llama-3.1-8b", "--set", "lora_directory=tests", "--set", "speculation=ngram"),
    "head of 256, windows": ("gemma-3-4b",),
    "experts": ("qwen3-30b-a3b",),
    "mxfp4, sinks": ("gpt-oss-20b",),
    "latents": ("deepseek-v2-lite",),
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_all_kernels_of_a_step_compile_and_have_room(model: str, card: str) -> None:
    _, sums = compiled(card, "--model", *MODELS[model])
    assert not sums["fewer_stages"] or card not in ("A100", "H100", "B200")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("card", [card for card, (capability, _) in CARDS.items() if capability not in ("8.0", "8.6")])
def test_a_store_of_fp8_is_read_where_a_card_has_it(card: str) -> None:
    compiled(card, "--set", "kv_dtype=fp8_e4m3", "--kernels", "attention")
