"""An engine process without a model, for tests of the front ends: `python fake_engine.py DIRECTORY`, spoken to like the
real one.

The option `model` says how to load: "fake", "broken" (answers Failed), "crash" (dies without a word), "slow" (takes a
second). A prompt says how to answer: words such as `tokens=20 delay=0.01`, and one of `silent` (never answers), `die`
(kills the engine), `error`. The answer repeats the prompt and counts, so that every request can be told from the
others.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import zmq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from paged_backend.config import EngineConfig
from paged_backend.engine.front_end_deaths import FrontEndDeaths
from paged_backend.errors import ErrorKind
from paged_backend.life_line import live_by
from paged_backend.messages import (
    RUNNING_FILE,
    STANDBY,
    SUSPECT_FILE,
    Abort,
    Failed,
    Finish,
    FromEngine,
    Goodbye,
    Hello,
    Ready,
    Shutdown,
    Stats,
    Submit,
    Tokens,
    decode_to_engine,
    encode,
    front_end_of,
)

EOS = "<eos>"
MAX_MODEL_LEN = 512
NUM_PAGES = 64
PAGE_SIZE = 16


def make_tokenizer() -> Tokenizer:
    """Byte-level, with a few merges so that tokens have several characters; the same in every process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the answer to tokens and delay is one two three four five six seven eight nine ten"], trainer
    )
    return tokenizer


def answer_ids(tokenizer: Tokenizer, prompt: str, num_tokens: int) -> list[int]:
    """What the fake engine says to `prompt`."""
    text = f" you said «{prompt}» 😀 " + " ".join(f"w{number}" for number in range(num_tokens))
    return tokenizer.encode(text).ids[:num_tokens]


def directives(prompt: str) -> dict[str, str]:
    return {word.partition("=")[0]: word.partition("=")[2] for word in prompt.split()}


class _Job:
    def __init__(self, tokenizer: Tokenizer, submit: Submit) -> None:
        given = np.frombuffer(submit.prompt_ids, np.int32).tolist()
        prompt = tokenizer.decode(given[: len(given) - submit.num_answered])
        said = directives(prompt)
        num_tokens = min(int(said.get("tokens", "8")), submit.sampling.max_tokens or 0)
        self.ids = answer_ids(tokenizer, prompt, num_tokens)
        if "eos" in said:
            self.ids[-1] = tokenizer.token_to_id(EOS)
        self.reason = "stop" if "eos" in said else "length"
        self.delay = float(said.get("delay", "0"))
        self.said = said
        self.num_sent = self.num_resumed = submit.num_answered
        assert self.ids[: self.num_sent] == given[len(given) - submit.num_answered :], (
            "the answer so far is not what was said"
        )
        self.arrived, self.traced = time.monotonic(), submit.traced
        self.next_time = self.arrived + self.delay
        self.prompt_len = len(submit.prompt_ids) // 4


class FakeEngine:
    def __init__(self, directory: Path, config: EngineConfig) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{directory}/engine.sock")
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._deaths = FrontEndDeaths()
        self._jobs: dict[int, _Job] = {}
        self._suspects: dict[int, _Job] = {}
        self._suspect = -1
        self._config = config
        self._tokenizer = make_tokenizer()
        self._tokenizer_path = directory / "tokenizer.json"
        self._tokenizer.save(str(self._tokenizer_path))
        self._next_stats = 0.0
        self._num_steps = 0
        self._end_by: float | None = None

    def run(self) -> int:
        if self._config.model == "crash":
            return 3
        if self._config.model == "slow":
            time.sleep(1)
        while self._end_by is None or (self._jobs and time.monotonic() < self._end_by):
            self._inbox.poll(2)
            while self._inbox.poll(0):
                self._receive(decode_to_engine(self._inbox.recv()))
            while (dead := self._deaths.next_one()) is not None:
                self._outboxes.pop(dead[0]).close(0)
                self._jobs = {
                    request_id: job for request_id, job in self._jobs.items() if front_end_of(request_id) != dead[0]
                }
            self._step()
        return 0

    def _send(self, front_end: int, message: FromEngine) -> None:
        if front_end in self._outboxes:
            self._outboxes[front_end].send(encode(message))

    def _receive(self, message: object) -> None:
        match message:
            case Hello():
                socket = self._outboxes[message.front_end] = self._context.socket(zmq.PUSH)
                socket.set_hwm(0)
                socket.connect(message.address)
                self._send(message.front_end, self._welcome())
                if message.process is not None:
                    self._deaths.watch(message.front_end, message.process)
            case Submit():
                job = _Job(self._tokenizer, message)
                if message.suspect:
                    self._suspects[message.request_id] = job
                else:
                    self._start(message.request_id, job)
            case Abort():
                self._jobs.pop(message.request_id, None)
                self._suspects.pop(message.request_id, None)
            case Goodbye():
                self._deaths.forget(message.front_end)
                self._outboxes.pop(message.front_end).close()
            case Shutdown():
                self._end_by = time.monotonic() + message.patience_seconds

    def _start(self, request_id: int, job: _Job) -> None:
        self._jobs[request_id] = job
        self._note_running()
        if "die" in job.said:
            os._exit(9)

    def _note_running(self) -> None:
        (self._tokenizer_path.parent / RUNNING_FILE).write_bytes(np.array(list(self._jobs), np.int64).tobytes())

    def _start_suspect(self) -> None:
        """One at a time, and its name is known before it runs."""
        running = self._jobs.get(self._suspect)
        if self._suspects and (running is None or running.num_sent >= running.num_resumed + 8):
            self._suspect = next(iter(self._suspects))
            (self._tokenizer_path.parent / SUSPECT_FILE).write_text(str(self._suspect))
            self._start(self._suspect, self._suspects.pop(self._suspect))
        elif running is None and self._suspect != -1:
            self._suspect = -1
            (self._tokenizer_path.parent / SUSPECT_FILE).write_text("")

    def _welcome(self) -> FromEngine:
        if self._config.model == "broken":
            return Failed("model 'broken': the checkpoint is broken")
        return Ready(
            str(self._tokenizer_path),
            self._tokenizer.get_vocab_size(),
            MAX_MODEL_LEN,
            NUM_PAGES * PAGE_SIZE,
            PAGE_SIZE,
            NUM_PAGES,
        )

    def _step(self) -> None:
        self._start_suspect()
        now = time.monotonic()
        due = {
            request_id: job
            for request_id, job in self._jobs.items()
            if job.next_time <= now and "silent" not in job.said
        }
        for front_end in self._outboxes:
            mine = {request_id: job for request_id, job in due.items() if front_end_of(request_id) == front_end}
            if mine:
                self._send(front_end, self._advance(mine, now))
        self._num_steps += bool(due)
        if now > self._next_stats and self._outboxes:
            self._next_stats = now + 0.1
            self._send(min(self._outboxes), self._stats())

    def _advance(self, jobs: dict[int, _Job], now: float) -> Tokens:
        request_ids, token_ids, started, admitted, finishes = [], [], {}, {}, []
        for request_id, job in jobs.items():
            if "error" in job.said:
                finishes.append(Finish(request_id, "", ErrorKind.OVERLOADED, "the queue is full"))
                continue
            if not job.num_sent:
                started[request_id] = 3
                if job.traced:
                    admitted[request_id] = job.arrived
            request_ids.append(request_id)
            token_ids.append(job.ids[job.num_sent])
            job.num_sent += 1
            job.next_time = now + job.delay
            if job.num_sent == len(job.ids):
                finishes.append(Finish(request_id, job.reason))
        for finish in finishes:
            del self._jobs[finish.request_id]
        if finishes:
            self._note_running()
        ids = np.array(token_ids, np.int32)
        logprobs = np.full(len(ids), -0.5, np.float32).tobytes()
        top = {entry: {int(token): -0.5, int(token) + 1: -1.5} for entry, token in enumerate(token_ids)}
        ranks = np.full(len(ids), 1, np.int32).tobytes()
        return Tokens(
            np.array(request_ids, np.int64).tobytes(),
            ids.tobytes(),
            logprobs,
            ranks,
            top,
            started,
            admitted,
            finishes=tuple(finishes),
        )

    def _stats(self) -> Stats:
        held = min(len(self._jobs), NUM_PAGES)
        return Stats(
            NUM_PAGES - held, held, 0, held * 8, len(self._jobs), 0, 0, 160, 48, self._num_steps, queue_times=(0.001,)
        )


if __name__ == "__main__":
    given = EngineConfig.model_validate_json(sys.stdin.readline())
    if STANDBY in sys.argv and not sys.stdin.readline():
        sys.exit(0)
    (own_folder,) = (word for word in sys.argv[1:] if not word.startswith("--"))
    live_by(Path(own_folder))
    sys.exit(FakeEngine(Path(own_folder), given).run())
