"""A tritonserver that crashes while it starts, without a word, is started again; one that says why is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_backend.errors import EngineError
from paged_backend.server.launch import Server, ServerSettings
from tests.unit.server.test_files import server_on_path  # noqa: F401

REFUSAL = "failed to load 'paged_llm' version 1: Internal: there is no such checkpoint"


def start(root: Path, script: str) -> tuple[int, list[str], str]:
    """A server whose executable is a shell script: how often it was started, the lines for the operator, the error."""
    starts, lines = root / "starts", list[str]()
    (root / "bin" / "tritonserver").write_text(f"#!/bin/sh\nulimit -c 0\necho >> {starts}\n{script}\n")
    with pytest.raises(EngineError) as error:
        Server(ServerSettings(), on_line=lines.append).start()
    return len(starts.read_text().splitlines()), lines, str(error.value)


@pytest.mark.parametrize("name", ["ABRT", "SEGV"])
def test_a_crash_without_a_word_is_tried_again_and_told(server_on_path: Path, name: str) -> None:  # noqa: F811
    num_starts, lines, error = start(server_on_path, f"kill -{name} $$")
    assert num_starts == 3
    assert lines == [f"paged: tritonserver was killed by SIG{name}; --log-verbose shows its log; trying again"] * 2
    assert error == f"tritonserver was killed by SIG{name}; --log-verbose shows its log"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f'echo "{REFUSAL}"; kill -ABRT $$', "there is no such checkpoint"),
        ("kill -KILL $$", "tritonserver was killed by SIGKILL"),
        ("exit 3", "tritonserver ended with exit code 3"),
    ],
    ids=["said why", "killed", "left"],
)
def test_other_ends_are_not_tried_again(server_on_path: Path, script: str, words: str) -> None:  # noqa: F811
    num_starts, lines, error = start(server_on_path, script)
    assert (num_starts, lines) == (1, [])
    assert words in error
