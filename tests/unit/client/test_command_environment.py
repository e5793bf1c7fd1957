"""The command where the machine is poor: a locale of ASCII, no room for files."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _paged(*arguments: str, environment: dict[str, str] | None = None, file_bytes: int = -1) -> tuple[int, str]:
    """Exit code, and what it wrote to stdout and stderr."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))) if file_bytes >= 0 else None
    command = [sys.executable, "-m", "paged_client.cli", *arguments]
    ended = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=limit,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout.decode()


def test_a_locale_without_utf8_changes_no_name_and_no_word() -> None:
    code, said = _paged("serve", "--model=/nowhere/façade", environment=_ASCII)
    assert (code, said) == (1, "paged: error: model: there is no folder /nowhere/façade\n")


def test_a_file_that_cannot_be_written_is_one_sentence() -> None:
    pytest.importorskip("tritonclient.grpc")
    code, said = _paged("serve", "--http-port=0", "--grpc-port=0", "--metrics-port=0", file_bytes=512)
    assert (code, said) == (1, "paged: error: a file cannot be used: File too large\n")
