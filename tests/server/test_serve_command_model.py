"""`paged demo` and `paged serve` with the model that comes with paged, and with checkpoints that only the engine can
refuse.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
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
    return subprocess.run(
        [sys.executable, "-m", "paged_client.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("compared", [pytest.param(True, marks=pytest.mark.long), False], ids=["twice", "once"])
def test_the_demo_tells_a_story_answers_questions_about_it_and_says_what_guesses_saved(
    tmp_path: Path, compared: bool
) -> None:
    """With --speculation everything is said once more without it, and compared."""
    temporary = tmp_path / "temporary"
    options = ["--speculation", "eagle3"] if compared else ["--set", "speculation=eagle3"]
    finished = run(temporary, "demo", *options)
    assert finished.returncode == 0, finished.stderr
    told, _, comparison = finished.stdout.partition("\nThe same without speculation:\n")
    conversation, report = told.rsplit("\n\n", 1)
    story, name, colour, place = re.split(r"^> .*\n", conversation, flags=re.MULTILINE)[1:]
    assert len(re.findall(r"[A-Z][^.!?]*[.!?]", story)) >= 5  # sentences
    assert f"a {colour.split()[-1].rstrip('.')} lantern" in story
    assert f" {name.split()[-1].rstrip('.')} " in story
    assert re.sub(r"^.*? (in|on|under|behind|at|by|next|near)\b", r"\1", place.strip()).rstrip(".") in story
    assert re.search(r"^\d+ tokens: the first after \d+ ms, then \d+ tokens/s\n", report)
    assert re.search(r"^prefix cache: [1-9]\d* of \d+ prompt tokens", report, re.MULTILINE)
    assert re.search(r"^pool: [1-9]\d* pages of 16 tokens; .* cached now", report, re.MULTILINE)
    guesses = re.search(r"^speculation: (\d+) of (\d+) guesses were right", report, re.MULTILINE)
    assert guesses is not None and int(guesses[1]) > int(guesses[2]) / 3
    assert bool(comparison) == compared
    assert not compared or re.match(
        r"all answers.*: \d+ tokens/s with speculation, \d+ without it .*\n4 of 4 answers are", comparison
    )
    assert all(line.startswith("paged: ") for line in finished.stderr.splitlines()), finished.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_ctrl_c_ends_the_demo_after_the_answer_that_is_on_its_way(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "paged_client.cli", "demo"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None
    first = demo.stdout.readline()
    demo.send_signal(signal.SIGINT)
    said, errors = demo.communicate(timeout=60)
    assert first.startswith("> ") and said.count("> ") <= 1, "it went on asking"
    assert (demo.returncode, errors.splitlines()[-1]) == (0, "paged: stopped"), errors
    assert "error" not in errors and list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_demo_goes_on_with_a_text_if_the_model_has_no_chat_template(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    finished = run(tmp_path / "temporary", "demo", f"--model={checkpoint}")
    said, _, text = finished.stdout.partition("this model has no chat template: it goes on with a text instead\n\n")
    assert said.startswith("> Tell me a story"), finished.stderr
    answer, report = text.rsplit("\n\n", 1)
    assert answer.startswith("Once upon a time ") and len(answer.split()) > 30
    assert report.count("\n") == 2 and "prefix cache" not in report


# in CI: a model that cannot be loaded in test_serve_command.py, an engine in tests/unit/engine/test_process.py
@pytest.mark.long
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
    ports = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")
    finished = run(temporary, "serve", f"--model={checkpoint}", "--instances=1", *ports)
    assert (finished.returncode, finished.stdout) == (1, "")
    (sentence,) = [line for line in finished.stderr.splitlines() if "error" in line]
    assert re.match("paged: error: .*(model.safetensors|NoSuchForCausalLM)", sentence)
    assert "Traceback" not in finished.stderr
    assert list(temporary.iterdir()) == []
