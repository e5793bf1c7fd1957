"""One engine at a time takes memory of a GPU."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid

import torch

from paged_backend.runner.sizing_lock import alone_on, alone_with

HOLDER = (
    "import sys; from paged_backend.runner.sizing_lock import alone_with\nwith alone_with(sys.argv[1], print): "
    "print('held', flush=True); sys.stdin.read()"
)


def test_the_second_waits_for_the_first_and_says_so() -> None:
    name, told, order = uuid.uuid4().hex, [], []

    def second() -> None:
        with alone_with(name, told.append):
            order.append("second")

    with alone_with(name, told.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not told:
            time.sleep(0.01)
        with alone_with(uuid.uuid4().hex, told.append):  # of another GPU
            order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert len(told) == 1 and told[0].startswith("waiting: another engine is loading on this GPU")


def test_an_engine_that_dies_while_it_loads_keeps_nobody_waiting() -> None:
    name, told = uuid.uuid4().hex, []
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
    with alone_with(name, told.append, 60):
        assert process.wait(10) == -signal.SIGKILL
    assert len(told) == 1


def test_patience_has_an_end() -> None:
    name, told = uuid.uuid4().hex, []
    with alone_with(name, told.append), alone_with(name, told.append, 0.2):
        pass
    assert told[1].startswith("warning: another engine has been loading")


def test_engines_on_a_cpu_load_side_by_side() -> None:
    told: list[str] = []
    with alone_on(torch.device("cpu"), told.append), alone_on(torch.device("cpu"), told.append):
        pass
    assert told == []
