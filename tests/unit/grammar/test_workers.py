"""The processes that compile and follow grammars: they say what is said here, and what they cannot finish is refused
while everything else goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import msgspec
import numpy as np
import pytest

from paged_backend.grammar import compiler_process as grammar_process
from paged_backend.grammar import workers
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace, compile_here
from paged_backend.grammar.follower_process import may_come
from paged_backend.grammar.grammars import Grammars
from paged_backend.grammar.guide import Guide
from paged_backend.grammar.lanes import CompileLanes, Job
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import read_vocabulary
from paged_backend.grammar.workers import FollowerLink, GrammarCompiler, Workers
from tests.structured_engine import EOS, TOKENIZER, VOCAB

# compiled in milliseconds, and then no end of its masks
BOMB = Grammar("guided_regex", "regex", "((((a|b){0,99}){0,99}){0,99}){0,99}")
HUGE = Grammar(
    "guided_json",
    "json",
    json.dumps({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(3000)}}),
)
PLAIN = Grammar("guided_regex", "regex", "[a-z]{3}")
# no trial finds it: it looks harmless for 80 tokens
LATE_BOMB = Grammar("guided_regex", "regex", "7{80}((([ a-z]{0,250}){0,250}){0,250}){0,250}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> VocabularyPlace:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return VocabularyPlace(str(path), VOCAB, (EOS,))


@pytest.fixture(scope="module")
def compiler(place: VocabularyPlace) -> Iterator[GrammarCompiler]:
    made = Workers(place)
    yield GrammarCompiler(made)
    made.close()


def refusal(compiler: GrammarCompiler, grammar: Grammar) -> str:
    verdict = compiler.compile(grammar)
    assert verdict is not None
    return verdict.refusal


@pytest.mark.parametrize(
    "grammar",
    [
        PLAIN,
        Grammar("guided_json", "json", '{"type":"object"}', compact=True),
        Grammar("guided_json", "json", '{"type":"string","pattern":"^a"}'),
        Grammar("guided_json", "json", "{"),
        Grammar("guided_grammar", "grammar", "root ::= foo"),
        Grammar("guided_grammar", "grammar", 'start: "a"+'),
    ],
    ids=lambda grammar: grammar.text,
)
def test_the_process_says_what_compiling_here_says(
    compiler: GrammarCompiler, place: VocabularyPlace, grammar: Grammar
) -> None:
    assert compiler.compile(grammar) == compile_here(
        grammar, read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids)
    )


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_one_compiled(compiler: GrammarCompiler) -> None:
    assert not refusal(compiler, PLAIN)  # it runs
    begun = time.monotonic()
    assert compiler.compile(HUGE, 0.5) is None
    assert time.monotonic() - begun < 10
    assert not refusal(compiler, PLAIN)


def test_a_grammar_that_is_compiled_soon_and_followed_slowly_is_refused(compiler: GrammarCompiler) -> None:
    assert refusal(compiler, BOMB).startswith("it is too slow to follow: ")
    assert not refusal(compiler, PLAIN)


@pytest.mark.long
def test_a_grammar_that_takes_too_much_memory_is_refused_and_the_next_one_compiled(compiler: GrammarCompiler) -> None:
    assert refusal(compiler, HUGE) == "it cannot be compiled with 1024 MiB of memory"
    assert not refusal(compiler, PLAIN)


@pytest.mark.parametrize("victim", ["child", "nursery"])
def test_a_process_that_dies_is_replaced(compiler: GrammarCompiler, victim: str) -> None:
    assert not refusal(compiler, PLAIN)
    assert compiler._worker is not None and compiler._workers._nursery is not None
    pid = compiler._worker.pid if victim == "child" else compiler._workers._nursery.pid
    os.kill(pid, signal.SIGKILL)
    while not workers._hung_up(compiler._worker.connection):
        time.sleep(0.01)
    assert not refusal(compiler, PLAIN)


def compile_while(compiler: GrammarCompiler, strike: Callable[[int], None]) -> str:
    """The refusal of a plain grammar; its child is stopped before it can answer, and struck when it has been asked."""
    assert not refusal(compiler, PLAIN)  # it runs
    assert compiler._worker is not None
    pid, connection = compiler._worker.pid, compiler._worker.connection
    connection.settimeout(None)

    def wait_and_strike() -> None:
        while connection.gettimeout() != workers._LOOK_SECONDS:  # it waits for the verdict
            time.sleep(0.01)
        strike(pid)

    os.kill(pid, signal.SIGSTOP)
    striker = Thread(target=wait_and_strike)
    striker.start()
    refused = refusal(compiler, PLAIN)  # on this thread: the nursery that it starts dies with the thread
    striker.join()
    return refused


def test_a_grammar_whose_process_is_killed_is_compiled_by_another(compiler: GrammarCompiler) -> None:
    assert not compile_while(compiler, lambda pid: os.kill(pid, signal.SIGKILL))


@pytest.mark.long
def test_a_grammar_whose_process_and_its_nursery_are_killed_is_compiled_by_others(compiler: GrammarCompiler) -> None:
    nursery = compiler._workers._nursery
    assert nursery is not None
    assert not compile_while(compiler, lambda _: nursery.kill())


def test_a_grammar_that_its_process_dies_of_is_refused_and_the_next_one_compiled(compiler: GrammarCompiler) -> None:
    def crash(pid: int) -> None:
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)

    assert compile_while(compiler, crash) == "it cannot be compiled with 1024 MiB of memory"
    assert not refusal(compiler, PLAIN)


def test_a_grammar_whose_processes_are_all_killed_is_no_mistake_of_its_callers(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.close()
    make, made = compiler._workers.make, []

    def make_stopped(kind: bytes) -> workers.Worker:
        worker = make(kind)
        made.append(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()
        return worker

    monkeypatch.setattr(compiler._workers, "make", make_stopped)
    with pytest.raises(OSError, match="3 processes were killed while they compiled a grammar"):
        compiler.compile(PLAIN)
    assert len(made) == 3
    monkeypatch.undo()
    assert not refusal(compiler, PLAIN)


@pytest.mark.long
def test_a_nursery_that_is_killed_while_it_starts_is_replaced(
    place: VocabularyPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        if len(started) == 1:
            started[0].kill()
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    made = Workers(place)
    assert not refusal(GrammarCompiler(made), PLAIN)
    assert len(started) == 2
    made.close()


def test_a_nursery_whose_engine_died_before_it_began_reads_no_vocabulary(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    place = VocabularyPlace(str(tmp_path / "nothing.json"), VOCAB, ())
    command = [sys.executable, "-m", "paged_backend.grammar.nursery", msgspec.json.encode(place).decode()]
    with theirs:
        # 1 if it had missed the file
        assert subprocess.run(command, stdin=theirs.fileno(), check=False).returncode == 0


def test_a_grammar_whose_masks_are_slow_is_refused(place: VocabularyPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_process, "_FOLLOW_SECONDS", -9.0)
    refused = compile_here(PLAIN, read_vocabulary(Path(place.tokenizer_path), place.size, place.eos_ids)).refusal
    assert refused.startswith("it is too slow to follow: 0 tokens took 0.00 s")


@pytest.mark.long
def test_a_process_that_cannot_start_is_our_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="did not start"):
        GrammarCompiler(Workers(VocabularyPlace(str(tmp_path / "nothing.json"), VOCAB, ()))).compile(PLAIN)


# ---- following


@pytest.fixture(scope="module")
def grammars(place: VocabularyPlace) -> Iterator[Grammars]:
    made = Grammars(Path(place.tokenizer_path), place.size, place.eos_ids)
    yield made
    made._workshop._workers.close()  # type: ignore[attr-defined]


def ids(text: str) -> list[int]:
    return [TOKENIZER.token_to_id("Ġ" if char == " " else char) for char in text]


def follow(grammars: Grammars, guide: Guide, text: str) -> float:
    """Until it is known what may come after a text. Returns the longest that any call to the follower took."""
    token_ids, longest = np.array(ids(text), np.int32), 0.0
    end = time.monotonic() + 200
    while not guide.knows(len(token_ids)):
        begun = time.monotonic()
        assert begun < end
        grammars.follower.ask(guide, token_ids)
        grammars.follower.wait()
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.001)
    return longest


@pytest.mark.long
def test_a_mask_without_end_holds_nobody_up_and_is_refused_while_others_go_on(grammars: Grammars) -> None:
    """On a busy machine a call may take a while; a mask of this grammar takes minutes."""
    hostile, innocent = (grammars.guide(grammar, (EOS,), 0) for grammar in (LATE_BOMB, PLAIN))
    for guide, text in ((hostile, "7" * 79), (innocent, "a")):
        follow(grammars, guide, text)
        assert guide.refusal is None
    begun = time.monotonic()
    longest = follow(grammars, hostile, "7" * 80 + "ab" * 8)
    assert hostile.refusal is not None and hostile.refusal.message.startswith("it is too slow to follow: ")
    assert longest < 1 and time.monotonic() - begun < 30
    follow(grammars, innocent, "ab")
    assert innocent.refusal is None and may_come(innocent.mask, *ids("z")) and not may_come(innocent.mask, *ids("7"))


def test_a_follower_that_is_killed_is_replaced_and_answers_go_on(grammars: Grammars) -> None:
    guide = grammars.guide(PLAIN, (EOS,), 0)
    follow(grammars, guide, "a")
    link = grammars.follower._link
    assert isinstance(link, FollowerLink)
    os.kill(link._worker.pid, signal.SIGKILL)
    follow(grammars, guide, "ab")
    assert guide.refusal is None and may_come(guide.mask, *ids("z")) and not may_come(guide.mask, EOS)
    follow(grammars, guide, "abc")
    assert may_come(guide.mask, EOS) and not may_come(guide.mask, *ids("z"))


def look(grammars: Grammars, guide: Guide, text: str) -> None:
    """Until a look at the text as drafts has been answered, or given up."""
    grammars.follower.look(guide, guide.num_followed, np.array(ids(text), np.int32), 4)
    end = time.monotonic() + 200
    while grammars.follower._asked and time.monotonic() < end:
        grammars.follower.wait()
        time.sleep(0.001)


def test_drafts_are_looked_at_behind_the_answer_and_an_older_look_is_of_no_use(grammars: Grammars) -> None:
    guide = grammars.guide(PLAIN, (EOS,), 0)
    follow(grammars, guide, "a")
    look(grammars, guide, "bc")
    assert guide.drafts.tolist() == ids("b") + ids("c") and len(guide.masks_ahead) == 2
    assert may_come(guide.mask_after(1), *ids("z")) and not may_come(guide.mask_after(1), EOS)
    assert may_come(guide.mask_after(2), EOS) and not may_come(guide.mask_after(2), *ids("z"))
    follow(grammars, guide, "ab")
    assert not len(guide.drafts)
    grammars.follower.look(guide, 1, np.array(ids("c"), np.int32), 4)
    assert not grammars.follower._asked


def test_a_mask_without_end_behind_a_draft_is_given_up_and_the_answer_goes_on(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each mask behind a draft took a minute of the processor's time."""
    guide = grammars.guide(PLAIN, (EOS,), 0)
    follow(grammars, guide, "a")
    link = grammars.follower._link
    assert isinstance(link, FollowerLink)
    clock = itertools.count(0, 60)
    monkeypatch.setattr(link, "cpu_seconds", lambda: float(next(clock)))
    os.kill(link._worker.pid, signal.SIGSTOP)
    look(grammars, guide, "b")
    assert guide.refusal is None and not guide.looks and not guide.deaths and guide.knows(1)
    follow(grammars, guide, "ab")
    look(grammars, guide, "c")
    assert guide.refusal is None and not len(guide.drafts)


def test_a_process_that_dies_at_a_look_is_no_fault_of_the_grammar(grammars: Grammars) -> None:
    guide = grammars.guide(PLAIN, (EOS,), 0)
    follow(grammars, guide, "a")
    link = grammars.follower._link
    assert isinstance(link, FollowerLink)
    os.kill(link._worker.pid, signal.SIGSTOP)
    Timer(0.2, os.kill, (link._worker.pid, signal.SIGKILL)).start()
    look(grammars, guide, "b")
    assert not guide.deaths and not guide.looks and guide.knows(1)
    follow(grammars, guide, "ab")
    assert guide.refusal is None


# ---- whose turn it is


class Endless:
    """Compiles what is called so for ever, anything else at once."""

    def __init__(self, compiled: list[str]) -> None:
        self._compiled = compiled

    def compile(self, grammar: Grammar, seconds: float) -> Verdict | None:
        if grammar.text == "endless":
            time.sleep(min(seconds, 1.0))
            return None
        self._compiled.append(grammar.text)
        return Verdict()


def test_a_grammar_waits_for_first_tries_of_others_alone_and_callers_have_turns() -> None:
    compiled: list[str] = []
    lanes, guide = CompileLanes(lambda: Endless(compiled)), Guide("", Future(), (), 0)
    asked = (*[("endless", "a")] * 10, ("mine", "a"), ("other's", "b"))
    jobs = [Job(Grammar("", "regex", text), caller) for text, caller in asked]
    begun = time.monotonic()
    for job in jobs:
        job.waiting.add(guide)
        lanes.put(job)
    assert jobs[-1].verdict.result(5) == Verdict()
    assert compiled == ["other's"] and time.monotonic() - begun < 2
    assert jobs[-2].verdict.result(10) == Verdict()
    # ten first tries of 0.05 s; ten of the second would be 4 s, and of whole seconds more
    assert time.monotonic() - begun < 2
    assert jobs[0].verdict.result(20).refusal == "it takes more than 20 s to compile"
