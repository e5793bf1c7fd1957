"""Processes that may be killed at any time, and replaced at once: `python -m paged_backend.grammar.nursery VOCABULARY`,
a child of the engine (workers.py).

Reading a large vocabulary takes seconds. This process does it once and then forks, as often as it is told to, children
that compile grammars (compiler_process.py) or follow them (follower_process.py). It never works on a grammar itself.
VOCABULARY is JSON. stdin is a socket that keeps messages apart. It says a Verdict when it is ready, or why it never
will be; then it is told "c" or "f" with the socket of a child to make, and says its number; or the number of a child
that was killed, whose place is free then.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from paged_backend.grammar import compiler_process, follower_process
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace
from paged_backend.grammar.vocabulary import GrammarError, Vocabulary, read_vocabulary

COMPILE, FOLLOW = b"c", b"f"
_NICE = 5  # of what compiles: steps, masks and answers of those who have theirs come first where processors are few
_PR_SET_PDEATHSIG = 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    control = socket.socket(fileno=os.dup(0))
    if _hung_up(control):
        return 0  # the engine was gone before this process was tied to it
    os.dup2(2, 1)  # libraries that print
    place = msgspec.json.decode(sys.argv[1], type=VocabularyPlace)
    try:
        vocabulary = read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids)
    except GrammarError as error:
        control.send(msgspec.msgpack.encode(Verdict(refusal=str(error), kind=error.kind)))
        return 1
    gc.collect()
    gc.freeze()  # what children share stays as it is
    control.send(msgspec.msgpack.encode(Verdict()))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return 0
        if message not in (COMPILE, FOLLOW):
            with suppress(ChildProcessError):  # of the nursery before this one
                os.waitpid(int(message), 0)
            continue
        child = os.fork()
        if child == 0:
            control.close()
            _work(message, socket.socket(fileno=descriptors[0]), vocabulary)
        os.close(descriptors[0])
        control.send(str(child).encode())


def _work(kind: bytes, connection: socket.socket, vocabulary: Vocabulary) -> NoReturn:
    _end_with_parent()
    try:
        if kind == COMPILE:
            os.nice(_NICE)
            _bound_memory(compiler_process.MAX_BYTES)
            compiler_process.compile_for(connection, vocabulary)
        else:
            _bound_memory(follower_process.MAX_BYTES)
            follower_process.follow(connection, vocabulary)
    finally:
        os._exit(0)


def _hung_up(connection: socket.socket) -> bool:
    state = select.poll()
    state.register(connection, 0)
    return bool(state.poll(0))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _bound_memory(num_bytes: int) -> None:
    """RLIMIT_DATA, not RLIMIT_AS: libraries reserve addresses that they never use."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    limit = int(found[1]) * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    os._exit(main())
