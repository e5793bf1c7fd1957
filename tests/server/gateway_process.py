"""The gateway as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")
import openai

KEY = "a key"


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[str]
    url: str
    errors: Path

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=self.url, **{"api_key": KEY, "max_retries": 0, **options})


@contextmanager
def gateway_to(url: str, folder: Path, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[Gateway]:
    """prefix: a command that starts the gateway's."""
    command = [*prefix, sys.executable, "-m", "paged_client.cli", "openai", "-u", url, "--port", "0", *arguments]
    errors = folder / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "PAGED_API_KEY": KEY}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"OpenAI's API on (http://\S+), model (\S+) from", line)
        assert found, line + errors.read_text()
        yield Gateway(process, found[1], errors)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
