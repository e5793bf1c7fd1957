"""Ranks die under live requests: whichever it is, all of its engine end, the next engine resumes every request, and no
token differs.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from paged_backend.process_id import ProcessId
from tests.front_end_process import FrontEndProcess
from tests.oracle import Oracle, save_checkpoint

pytestmark = pytest.mark.long  # four processes import torch, twice

SIZE = 2
NUM_TOKENS = 40  # of an answer, as tests/front_end_process.py asks
OPTIONS = {
    "device": "cpu",
    "num_pages": 200,
    "max_num_sequences": 8,
    "max_batched_tokens": 64,
    "max_model_len": 300,
    "max_engine_restarts": 100,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "LlamaForCausalLM")


@pytest.fixture
def front_end(checkpoint: Path) -> Iterator[FrontEndProcess]:
    """With an engine of two ranks, and a standby of two."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        process = FrontEndProcess(
            uuid.uuid4().hex, 1, Path(folder), model=str(checkpoint), command=None, tensor_parallel_size=SIZE, **OPTIONS
        )
        wait(lambda: process.told)
        yield process
        process.process.kill()
        process.process.wait()


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            stat = (folder / "stat").read_text() if folder.name.isdigit() else ""
            ranks = "(paged-rank)" in stat or b"rank_process" in (folder / "cmdline").read_bytes() if stat else False
        except OSError:  # it has ended
            continue
        if ranks and int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(folder.name))
    return found


def gone(pid: int) -> bool:
    return ProcessId.of(pid) is None


@pytest.mark.parametrize(
    "victims", [["rank", "rank"], ["engine", "rank"], ["stopped rank's engine"]], ids=lambda victims: ", ".join(victims)
)
def test_requests_survive_the_death_of_any_rank(
    front_end: FrontEndProcess, checkpoint: Path, victims: list[str]
) -> None:
    prompts = [f"question {number}, of some length" for number in range(6)]
    expected = Oracle(checkpoint).greedy([list(prompt.encode()) for prompt in prompts], NUM_TOKENS)
    for prompt in prompts:
        front_end.ask(prompt)
    for victim in victims:
        seen = front_end.num_tokens
        engine = front_end.told["engine"]
        wait(partial(children_of, engine))
        (rank,) = children_of(engine)
        if victim == "stopped rank's engine":  # a rank that can do nothing itself goes with rank 0
            os.kill(rank, signal.SIGSTOP)
        os.kill(rank if victim == "rank" else engine, signal.SIGKILL)
        for pid in (rank, engine):
            wait(partial(gone, pid))
        wait(
            lambda engine=engine, seen=seen: (
                front_end.told["engine"] != engine and (front_end.num_tokens > seen or front_end.answers)
            )
        )
    wait(lambda: len(front_end.answers) == len(prompts))
    for prompt, tokens in zip(prompts, expected, strict=True):
        answer = front_end.answers[prompt]
        assert (answer["ids"], answer["reason"], answer["error"]) == (tokens, "length", "")


def test_no_rank_is_left_behind_when_the_last_front_end_is_killed(front_end: FrontEndProcess) -> None:
    wait(lambda: front_end.told["standby"])
    parents = [front_end.told["engine"], front_end.told["standby"]]
    wait(lambda: all(children_of(pid) for pid in parents))
    ranks = [rank for pid in parents for rank in children_of(pid)]
    assert len(ranks) == 2 * (SIZE - 1)
    front_end.kill()
    wait(lambda: all(gone(pid) for pid in parents + ranks))
