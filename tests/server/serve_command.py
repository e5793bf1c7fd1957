"""`paged serve` as a process, around a model that is a stand-in: it echoes words, slowly if asked to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

CONFIG = """
name: "paged_llm"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { count: 2 kind: KIND_MODEL } ]
"""
MODEL = """
import json, os, sys, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, arguments):
        page_size = json.loads(arguments["model_config"])["parameters"]["page_size"]["string_value"]
        print("paged: stand-in starts with", page_size, file=sys.stderr, flush=True)
        time.sleep(float(os.environ.get("LOAD_SECONDS", "0")))
        if "LOAD_ERROR" in os.environ:
            print("paged: error:", os.environ["LOAD_ERROR"], file=sys.stderr, flush=True)
            raise RuntimeError("not shown")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for word in pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].split():
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([word], object))]))
                time.sleep(float(os.environ.get("WORD_SECONDS", "0")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
PAGED = """
import sys
from pathlib import Path
from paged_backend.server import files as server_files
repository = Path(sys.argv.pop(1))
server_files.repository_folder = lambda: repository
from paged_client.cli import main
main()
"""


def save_nothing(folder: Path) -> Path:
    """A folder that passes for a checkpoint at first sight."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


class Command:
    """A `paged serve` process."""

    def __init__(self, stand_in: Path, checkpoint: Path, folder: Path, *arguments: str, **environment: str) -> None:
        self.temporary = folder / f"temporary_{time.monotonic_ns()}"
        self.temporary.mkdir()
        options = ["serve", f"--model={checkpoint}", "--set=page_size=32", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PAGED, str(stand_in), *options],
            env={**os.environ, "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> dict[str, str]:
        """Reads the ready block: {"HTTP": url, "gRPC": url, "metrics": url, "curl": command}."""
        assert self.process.stdout is not None
        block = {}
        while line := self.process.stdout.readline():
            words = line.split(maxsplit=1)
            if words and words[0] in ("HTTP", "gRPC", "metrics", "curl"):
                block[words[0]] = words[1].strip()
            if line.startswith("Ctrl-C"):
                return block
        raise AssertionError(f"never ready: {self.process.communicate()[1]}")

    def server_folder(self) -> Path:
        return next(self.temporary.glob("paged-serve-*"))

    def finish(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code and stderr."""
        stderr = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode, stderr

    def servers(self) -> list[int]:
        """tritonserver and its stubs: every process whose environment or command names our temporary folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    known = (
                        str(self.temporary).encode()
                        in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    )
                except OSError:
                    continue
                if known:
                    found.append(int(entry.name))
        return found

    def front_ends(self) -> list[int]:
        """The stubs that run a model; without the short-lived ones that tritonserver asks for their version."""
        commands = {pid: command_of(pid).split("\0") for pid in self.servers()}
        return [
            pid
            for pid, command in commands.items()
            if command[0].endswith("/triton_python_backend_stub") and any("model.py" in word for word in command)
        ]


def command_of(pid: int) -> str:
    """Its words, each ended by a null byte; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def ask(url: str, words: str) -> str:
    with urlopen(f"{url}/v2/models/paged_llm/generate_stream", json.dumps({"text_input": words}).encode()) as answer:
        return " ".join(re.findall(r'"text_output":"(\w+)"', answer.read().decode()))


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Counts naps, not time: a machine may have stood still meanwhile."""
    for _ in range(round(seconds / 0.05)):
        if condition():
            return True
        time.sleep(0.05)
    return condition()
