"""Front ends as processes of their own, which can be killed: `python -m tests.front_end_process KEY NUM_FRONT_ENDS
FOLDER OPTIONS`.

Together they have a fake engine (tests/server/fake_engine.py), or with the option "command" another one. Each is told
on stdin what to ask, a prompt a line, and says on stdout, in JSON, again and again what it knows of the engine, and
each answer once. The end of stdin tells it to leave.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.engine_client import starter as engine_starter
from paged_backend.engine_client.client import EngineClient
from paged_backend.engine_client.live_requests import Piece
from paged_backend.engine_client.replicas import Replicas
from paged_backend.messages import Prompt, Stats
from paged_backend.request import SamplingParams
from tests.server import fake_engine

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]
STANDBY_AFTER_SECONDS = 0.2


class FrontEndProcess:
    """The parent's side."""

    def __init__(self, key: str, num_front_ends: int, folder: Path, **options: Any) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.front_end_process",
            key,
            str(num_front_ends),
            str(folder),
            json.dumps(options),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # front_end, owner, engine, alive, standby, held, losses: the newest. Of several replicas the first's engine;
        # and `engines`, of all
        self.told: dict[str, Any] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.num_tokens = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            self.num_tokens = told.pop("num_tokens", self.num_tokens)
            if "prompt" in told:
                self.answers[told["prompt"]] = told
            else:
                self.told = told

    def ask(self, prompt: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(prompt + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def leave(self) -> int:
        """In peace. Returns the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(20)


def _say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")  # at once: several threads tell
    sys.stdout.flush()


def prompt_of(text: str, model: str) -> Prompt:
    """The fake engine answers as its prompts say. Real ones take the bytes as token ids; a first word "guided" asks for
    a grammar's words, and what follows a # tells questions apart and is not asked.
    """
    if model == "fake":
        return Prompt(
            np.array(fake_engine.make_tokenizer().encode(text).ids, np.int32), SamplingParams(max_tokens=400), ()
        )
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    if text.startswith("guided"):
        sampling = SamplingParams(max_tokens=40, temperature=0.0, guided_regex="[a-z ]{30,40}")
    return Prompt(np.frombuffer(text.partition("#")[0].encode(), np.uint8).astype(np.int32), sampling, ())


def _ask(client: EngineClient | Replicas, prompt: str, model: str, tokens: list[int]) -> None:
    ids: list[int] = []

    def receive(piece: Piece) -> None:
        ids.extend(piece.token_ids)
        tokens.extend(piece.token_ids)
        if piece.finish is not None:
            _say(prompt=prompt, ids=ids, reason=piece.finish.reason, error=piece.finish.message, num_tokens=len(tokens))

    client.submit(prompt_of(prompt, model), "", time.monotonic(), receive)


def main() -> None:
    key, num_front_ends, folder, given = sys.argv[1:]
    options = {"model": "fake", **json.loads(given)}
    command = options.pop("command", COMMAND)
    tempfile.tempdir = folder
    engine_starter.STANDBY_AFTER_SECONDS = STANDBY_AFTER_SECONDS
    config = EngineConfig(**options)
    client = (EngineClient if config.replicas == 1 else Replicas).connect(config, key, int(num_front_ends), command)
    clients = client._clients if isinstance(client, Replicas) else [client]
    held, losses = [0], [0]

    def note(stats: Stats, replica: int = 0) -> None:
        held[0] = stats.pages_held

    def note_loss() -> None:
        losses[0] += 1

    client.on_loss = note_loss
    client.start(note)
    tokens: list[int] = []

    def tell() -> None:
        while True:
            standby = clients[0]._supervisor._starter._standby
            now = {
                "front_end": client.front_end,
                "owner": clients[0]._supervisor.owner,
                "engine": clients[0].engine_pid,
                "engines": [one.engine_pid for one in clients if one.alive],
                "alive": client.alive,
                "losses": losses[0],
            }
            _say(**now, standby=standby.pid if standby is not None else None, num_tokens=len(tokens), held=held[0])
            time.sleep(0.05)

    threading.Thread(target=tell, daemon=True).start()
    for line in sys.stdin:
        _ask(client, line.rstrip("\n"), options["model"], tokens)
    client.close()


if __name__ == "__main__":
    main()
