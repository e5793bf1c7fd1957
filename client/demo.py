"""`paged demo`: a story over gRPC, questions about it, the answers as they arrive, and what they took."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from rich.console import Console

from paged_backend.errors import EngineError
from paged_backend.server.launch import Server, ServerSettings
from paged_client.asking import Speed, printable
from paged_client.client import PagedClient, Stream
from paged_client.errors import InvalidRequestError, PagedError

DEMO_PROMPT = "Once upon a time"
DEMO_QUESTIONS = (
    "Tell me a story about a fox and a lantern.",
    "What was the fox's name?",
    "What colour was the lantern?",
    "Where did the fox put the lantern?",
)
_METRIC = re.compile(r"^(?P<name>paged_\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_HELD = 'paged_pages{state="held"}'
_CACHED = 'paged_pages{state="cached"}'
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.6  # gauges are published a few times a second
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Answered:
    """One answer, and how fast it came."""

    text: str
    speed: Speed


def run_demo(server: Server, prompt: str | None, max_tokens: int, console: Console) -> list[Answered]:
    """Streams a conversation to `console` (or, if there is a prompt or the model has no chat template, the continuation
    of a text), then prints the first answer's tokens/s, what the prefix cache knew of the later questions' prompts,
    what the pool held, and how many guesses were right, if any were made. Nothing if the server is told to stop.

    Raises:
        EngineError: the server refused or broke off an answer.
    """
    client = PagedClient(server.addresses.grpc_url, model=server.settings.model_name, timeout=_ANSWER_SECONDS)
    try:
        with client, PoolWatch(server.addresses.metrics_url) as pool:
            answers = _converse(client, max_tokens, console) if prompt is None else []
            if not answers:
                answers = [_continue(client, prompt or DEMO_PROMPT, max_tokens, console)]
    except PagedError as error:
        if server.stopping:
            return []
        raise EngineError(f"the server refused the question: {error}") from None
    first, *later = (answered.speed for answered in answers)
    console.print(f"\n{first.answer()}", soft_wrap=True)
    if later:
        num_cached, num_tokens = (
            sum(getattr(speed.usage, name) for speed in later) for name in ("num_cached_tokens", "num_input_tokens")
        )
        console.print(
            f"prefix cache: {num_cached} of {num_tokens} prompt tokens of the later questions were known",
            soft_wrap=True,
        )
    console.print(pool.summary(), soft_wrap=True)
    if guesses := pool.guesses():
        console.print(guesses, soft_wrap=True)
    return answers


def run_demo_twice(
    running: Callable[[ServerSettings], AbstractContextManager[Server]],
    settings: ServerSettings,
    speculation: str,
    demo: Callable[..., list[Answered]],
    console: Console,
) -> None:
    """The conversation on a server that guesses, then unseen on one that does not; prints what guessing saved.

    running: starts a server and stops it. demo: `run_demo` with a prompt and lengths.
    """
    with running(replace(settings, options={**settings.options, "speculation": speculation})) as server:
        guessing = demo(server, console=console)
        if server.stopping:  # Ctrl-C came while the last answer was made
            return
    console.print("\nThe same without speculation:", soft_wrap=True)
    others = {name: value for name, value in settings.options.items() if name != "draft_model"}
    with running(replace(settings, options={**others, "speculation": "off"})) as server:
        plain = demo(server, console=Console(quiet=True))
    if plain:
        console.print(compare(guessing, plain), soft_wrap=True)


def compare(guessing: Sequence[Answered], plain: Sequence[Answered]) -> str:
    """Two lines on the same conversation with speculation and without; one if nothing came after the first tokens."""
    same = sum(one.text == other.text for one, other in zip(guessing, plain, strict=True))
    words = f"{same} of {len(plain)} answers are the same, word for word"
    with_it, without = _pace(guessing), _pace(plain)
    if not with_it or not without:
        return words
    return (
        f"all answers, after their first tokens: {with_it:.0f} tokens/s with speculation, {without:.0f} without it "
        f"({with_it / without:.2f} times)\n{words}"
    )


def _pace(answers: Sequence[Answered]) -> float:
    """Tokens a second after each answer's first; 0: there were none."""
    counts, seconds = zip(*(answered.speed.later for answered in answers), strict=True)
    return sum(counts) / sum(seconds) if sum(seconds) > 0 else 0.0


def _converse(client: PagedClient, max_tokens: int, console: Console) -> list[Answered]:
    """What each question was answered; nothing if the model has no chat template."""
    messages: list[dict[str, str]] = []
    answers = []
    for question in DEMO_QUESTIONS:
        console.print(f"> {question}", style="bold", markup=False, soft_wrap=True)
        messages.append({"role": "user", "content": question})
        stream = client.stream(messages=messages, max_tokens=max_tokens, temperature=0)
        try:
            answers.append(_show(stream, console))
        except InvalidRequestError as error:
            if error.field != "messages":
                raise
            console.print(
                "this model has no chat template: it goes on with a text instead\n", style="dim", soft_wrap=True
            )
            return []
        messages.append({"role": "assistant", "content": stream.answer.text})
    return answers


def _continue(client: PagedClient, prompt: str, max_tokens: int, console: Console) -> Answered:
    console.print(prompt, style="bold", markup=False, end="", soft_wrap=True)
    return _show(client.stream(prompt, max_tokens=max_tokens, temperature=0.7, seed=1), console)


def _show(stream: Stream, console: Console) -> Answered:
    speed = Speed()
    for delta in stream:
        speed.take(delta)
        console.print(printable(delta.text), end="", markup=False, soft_wrap=True)
    console.print()
    return Answered(stream.answer.text, speed)


@dataclass
class PoolWatch:
    """Reads the pool's gauges while the answer runs and keeps the fullest moment and the last."""

    url: str
    fullest: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> PoolWatch:
        self._thread = threading.Thread(target=self._poll, name="pool-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(_SETTLE_SECONDS)
        self._done.set()
        assert self._thread is not None
        self._thread.join()

    def _poll(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self.last = read_gauges(self.url)
            if self.last.get(_HELD, 0.0) > self.fullest.get(_HELD, 0.0):
                self.fullest = self.last

    def summary(self) -> str:
        """One line on the pool: its size, its fullest moment, and what stays cached."""
        total = self.last.get("paged_pages_total")
        if not total:
            return "pool: no metrics"
        held, utilisation = self.fullest.get(_HELD, 0.0), 100 * self.fullest.get("paged_utilisation", 0.0)
        fullest = (
            f"{held:.0f} held at most, {utilisation:.0f} % of their slots with live tokens (utilisation)"
            if held
            else "none held when the gauges were read"
        )
        return (
            f"pool: {total:.0f} pages of {self.last.get('paged_page_size', 0):.0f} tokens; {fullest}; "
            f"{self.last.get(_CACHED, 0):.0f} cached now"
        )

    def guesses(self) -> str:
        """One line on speculation; empty if nothing was guessed."""
        proposed, accepted, checked = (
            self.last.get(f"paged_drafts_{name}_total", 0.0) for name in ("proposed", "accepted", "checked")
        )
        if not checked:
            return ""
        return (
            f"speculation: {accepted:.0f} of {proposed:.0f} guesses were right, {accepted / checked:.1f} in each step "
            "that had any"
        )


def read_gauges(url: str) -> dict[str, float]:
    """`paged_…` series of a metrics page; labels other than the pool's state are dropped, and counts that differ in
    them added up. Empty if the page cannot be read.
    """
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            page = answer.read().decode()
    except OSError:
        return {}
    gauges: dict[str, float] = {}
    for found in _METRIC.finditer(page):
        state = re.search(r'state="\w+"', found["labels"] or "")
        name = found["name"] + (f"{{{state[0]}}}" if state else "")
        gauges[name] = float(found["value"]) + (gauges.get(name, 0.0) if name.endswith("_total") else 0.0)
    return gauges
