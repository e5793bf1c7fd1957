"""The engine's loop behind its sockets, with a simulated runner: who is told what, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.process import EngineProcess, _device_words
from paged_backend.errors import EngineError, ErrorKind
from paged_backend.life_line import create_life_line, hold_life_line
from paged_backend.messages import (
    Abort,
    Failed,
    FromEngine,
    Goodbye,
    Hello,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    decode_from_engine,
    encode,
    request_id_of,
)
from paged_backend.process_id import ProcessId
from paged_backend.request import SamplingParams
from paged_backend.runner.placement import leave_a_core
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner, solo

VOCAB = 97


class FrontEnd:
    """A front end's sockets and what it has heard."""

    def __init__(self, directory: Path, number: int, process: ProcessId | None = None) -> None:
        self._context = zmq.Context()
        self.number = number
        self._inbox = self._context.socket(zmq.PULL)
        address = f"ipc://{directory}/front-{number}.sock"
        self._inbox.bind(address)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.connect(f"ipc://{directory}/engine.sock")
        self.say(Hello(number, address, process))

    def say(self, message: ToEngine) -> None:
        self._outbox.send(encode(message))

    def submit(self, serial: int, prompt: list[int], max_tokens: int = 4) -> int:
        request_id = request_id_of(self.number, serial)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.say(Submit(request_id, np.array(prompt, np.int32).tobytes(), sampling, (), "", time.monotonic()))
        return request_id

    def hear(self, kind: type[FromEngine], seconds: float = 5) -> FromEngine:  # type: ignore[valid-type]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._inbox.poll(100):
                message = decode_from_engine(self._inbox.recv())
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"heard no {kind}")

    def answers(self, ids: list[int]) -> dict[int, list[int]]:
        """Token ids of each request, once all of `ids` are finished."""
        tokens: dict[int, list[int]] = {}
        missing = set(ids)
        while missing:
            message = self.hear(Tokens)
            for request_id, token in zip(
                np.frombuffer(message.request_ids, np.int64), np.frombuffer(message.token_ids, np.int32), strict=True
            ):
                tokens.setdefault(int(request_id), []).append(int(token))
            missing -= {finish.request_id for finish in message.finishes}
        return tokens

    def close(self) -> None:
        self._context.destroy(linger=0)


def simulated(limits: SchedulerLimits) -> tuple[Engine, Scheduler]:
    runner = SimulatedRunner(
        limits.max_num_sequences,
        limits.num_pages,
        limits.page_size,
        limits.max_model_len,
        limits.max_batched_tokens,
        VOCAB,
    )
    scheduler = Scheduler(limits)
    return Engine(scheduler, runner, steps_ahead=1), scheduler


LIMITS = SchedulerLimits(page_size=4, num_pages=64, max_model_len=64, max_num_sequences=8, max_batched_tokens=64)
READY = Ready(tokenizer_path=None, vocab_size=VOCAB, max_model_len=64, max_pool_tokens=256, page_size=4, num_pages=64)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=lambda: EngineProcess(tmp_path).run(lambda _: (*simulated(LIMITS), READY)))
    thread.start()
    yield thread
    thread.join(5)
    assert not thread.is_alive()


def test_each_front_end_hears_of_its_own_requests_only(tmp_path: Path, loop: threading.Thread) -> None:
    first, second = FrontEnd(tmp_path, 1), FrontEnd(tmp_path, 2)
    assert first.hear(Ready) == second.hear(Ready) == READY
    ids = {
        front_end: [front_end.submit(serial, [front_end.number, serial], 6) for serial in range(3)]
        for front_end in (first, second)
    }
    for front_end in (first, second):
        answers = front_end.answers(ids[front_end])
        assert answers == {
            request_id_of(front_end.number, serial): solo([front_end.number, serial], 6, (), VOCAB)
            for serial in range(3)
        }
    assert isinstance(first.hear(Stats), Stats)  # the lowest-numbered front end publishes
    for front_end in (first, second):
        front_end.say(Goodbye(front_end.number))
        front_end.close()
    FrontEnd(tmp_path, 3).say(Shutdown(0.1))


def test_an_aborted_request_is_not_spoken_of_again(tmp_path: Path, loop: threading.Thread) -> None:
    front_end = FrontEnd(tmp_path, 0)
    front_end.hear(Ready)
    first = front_end.submit(1, [1], max_tokens=60)
    front_end.say(Abort(first))
    second = front_end.submit(2, [2])
    assert front_end.answers([second])[second] == solo([2], 4, (), VOCAB)
    third = front_end.submit(3, [3])
    assert set(front_end.answers([third])) == {third}
    front_end.say(Shutdown(0.0))


def test_the_requests_of_a_front_end_that_died_are_forgotten_and_those_of_others_go_on(tmp_path: Path) -> None:
    def slow(_: Path) -> tuple[Engine, Scheduler, Ready]:
        engine, scheduler = simulated(replace(LIMITS, max_model_len=4000, num_pages=4000))
        launch = engine._runner.launch
        engine._runner.launch = lambda batch: (time.sleep(0.002), launch(batch))  # type: ignore[method-assign]
        return engine, scheduler, READY

    loop = threading.Thread(target=lambda: EngineProcess(tmp_path).run(slow))
    loop.start()
    with subprocess.Popen(["sleep", "300"]) as process:
        dead, heir = FrontEnd(tmp_path, 0, ProcessId.of(process.pid)), FrontEnd(tmp_path, 1, ProcessId.of(os.getpid()))
        assert dead.hear(Ready) and heir.hear(Ready)
        for serial in range(3):
            dead.submit(serial, [1, 2, 3], max_tokens=3900)  # eight seconds
        own = heir.submit(0, [1, 2, 3], max_tokens=100)
        assert dead.hear(Tokens)
        process.kill()
    assert heir.answers([own])[own] == solo([1, 2, 3], 100, (), VOCAB)
    while numbers(heir).num_running:
        pass
    assert numbers(heir).pages_held == 0
    assert numbers(heir).num_steps < 3000, "they ran to their end"
    dead.submit(9, [1, 2, 3], max_tokens=3900)  # was under way when it died
    heir.answers([heir.submit(1, [1, 2, 3])])
    assert (numbers(heir).num_running, numbers(heir).num_waiting) == (0, 0)
    heir.say(Shutdown(0.0))
    loop.join(5)
    assert not loop.is_alive()


def numbers(front_end: FrontEnd) -> Stats:
    stats = front_end.hear(Stats)
    assert isinstance(stats, Stats)
    return stats


def test_garbage_in_the_engines_socket_is_dropped(tmp_path: Path, loop: threading.Thread) -> None:
    front_end = FrontEnd(tmp_path, 0)
    assert front_end.hear(Ready)
    for garbage in (b"", b"\xff" * 100, encode(Failed("an engine's"))):
        front_end._outbox.send(garbage)
    first = front_end.submit(1, [1])
    assert front_end.answers([first])[first] == solo([1], 4, (), VOCAB)
    front_end.say(Shutdown(0.0))


def test_a_refusal_reaches_the_caller(tmp_path: Path, loop: threading.Thread) -> None:
    front_end = FrontEnd(tmp_path, 0)
    request_id = front_end.submit(1, [1] * 64)
    (finish,) = front_end.hear(Tokens).finishes
    assert (finish.request_id, finish.error) == (request_id, ErrorKind.INVALID)
    front_end.say(Shutdown(0.0))


def test_shutdown_waits_for_requests_of_other_front_ends_but_not_for_their_goodbyes(
    tmp_path: Path, loop: threading.Thread
) -> None:
    owner, other = FrontEnd(tmp_path, 0), FrontEnd(tmp_path, 1)
    owner.hear(Ready), other.hear(Ready)
    request_id = other.submit(1, [3], max_tokens=60)
    first = np.frombuffer(other.hear(Tokens).token_ids, np.int32).tolist()
    owner.say(Goodbye(0))
    owner.say(Shutdown(60.0))
    assert first + other.answers([request_id])[request_id] == solo([3], 60, (), VOCAB)
    loop.join(5)
    assert not loop.is_alive()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineError("no such checkpoint"), "no such checkpoint"),
        (
            ImportError("a broken package"),
            "the engine could not start: ImportError: a broken package; its log has the traceback",
        ),
    ],
    ids=["foreseen", "not foreseen"],
)
def test_an_engine_that_cannot_load_tells_every_front_end_why(tmp_path: Path, error: Exception, told: str) -> None:
    def load(_: Path) -> tuple[Engine, Scheduler, Ready]:
        raise error

    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(EngineProcess(tmp_path).run(load)))
    thread.start()
    for number in range(2):
        assert FrontEnd(tmp_path, number).hear(Failed) == Failed(told)
    thread.join(5)
    assert statuses == [1]


def test_an_engine_that_fails_is_gone_at_once_whatever_its_threads_are_at() -> None:
    program = """
import time
from concurrent.futures import ThreadPoolExecutor
from paged_backend.engine.process import end_with
def fail():
    ThreadPoolExecutor().submit(time.sleep, 300)
    raise MemoryError("while a grammar is compiled")
end_with(fail)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "while a grammar is compiled" in ended.stderr


def _idle_with_torch(pid: int) -> bool:
    def ticks() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = ticks()
    time.sleep(0.5)
    return ticks() == before and "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_a_standby_has_imported_everything_and_touches_nothing_until_it_is_told_to_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "paged_backend.engine.process", str(folder), "--standby"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(
            EngineConfig(num_pages=8, max_model_len=64, max_num_sequences=2).model_dump_json().encode() + b"\n"
        )
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not _idle_with_torch(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
        if torch.version.cuda is None:  # where there are no kernels to compile, every start is spared that
            assert "libtriton" not in Path(f"/proc/{process.pid}/maps").read_text()
        assert not folder.exists()
        folder.mkdir()
        create_life_line(folder)
        line = hold_life_line(folder)
        process.stdin.write(b"start\n")
        process.stdin.flush()
        front_end = FrontEnd(folder, 0)
        ready = front_end.hear(Ready, 30)
        assert isinstance(ready, Ready) and ready.num_pages == 8
        request_id = front_end.submit(1, [1, 2, 3])
        assert len(front_end.answers([request_id])[request_id]) == 4
        process.stdin.close()  # as if the one that started it had died
        time.sleep(0.3)
        assert process.poll() is None
        os.close(line)  # the last one
        assert process.wait(10) == -signal.SIGKILL


def test_a_standby_ends_with_its_parents_stdin(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "paged_backend.engine.process", str(tmp_path / "run"), "--standby"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        # no checkpoint: that is said when it is to start
        process.stdin.write(EngineConfig(model=str(tmp_path)).model_dump_json().encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("num_cores", "environment", "threads"), [(4, {}, 3), (1, {}, 1), (64, {}, 6), (4, {"OMP_NUM_THREADS": "6"}, 6)]
)
def test_a_processor_is_left_to_the_server(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, environment: dict[str, str], threads: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(num_cores))
    try:
        torch.set_num_threads(6)
        leave_a_core(environment)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            ": CUDA out of memory. Tried to allocate 2 GiB",
            id="torch's",
        ),
        pytest.param(
            RuntimeError("CUDA error: device-side assert triggered\nhints"),
            ": CUDA error: device-side assert triggered",
            id="the device's",
        ),
        pytest.param(KeyError("a secret prompt"), "", id="may quote a prompt"),
        pytest.param(KeyError(), "", id="says nothing"),
    ],
)
def test_the_last_words_tell_what_the_device_said_and_nothing_of_prompts(error: BaseException, words: str) -> None:
    assert _device_words(error) == words
