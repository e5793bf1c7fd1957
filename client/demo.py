"""`paged demo`: a story over gRPC, questions about it, the answers as they arrive, and what they took."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from dataclasses import dataclass, field

from rich.console import Console

from paged_backend.errors import EngineError
from paged_backend.server.launch import Server
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


def run_demo(server: Server, prompt: str | None, max_tokens: int, console: Console) -> None:
    """Streams a conversation to `console` (or, if there is a prompt or the model has no chat template, the continuation
    of a text), then prints the first answer's tokens/s, what the prefix cache knew of the later questions' prompts, and
    what the pool held. Returns early if the server is told to stop.

    Raises:
        EngineError: the server refused or broke off an answer.
    """
    client = PagedClient(server.addresses.grpc_url, model=server.settings.model_name, timeout=_ANSWER_SECONDS)
    try:
        with client, PoolWatch(server.addresses.metrics_url) as pool:
            speeds = _converse(client, max_tokens, console) if prompt is None else []
            if not speeds:
                speeds = [_continue(client, prompt or DEMO_PROMPT, max_tokens, console)]
    except PagedError as error:
        if server.stopping:
            return
        raise EngineError(f"the server refused the question: {error}") from None
    first, *later = speeds
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


def _converse(client: PagedClient, max_tokens: int, console: Console) -> list[Speed]:
    """How fast each question was answered; nothing if the model has no chat template."""
    messages: list[dict[str, str]] = []
    speeds = []
    for question in DEMO_QUESTIONS:
        console.print(f"> {question}", style="bold", markup=False, soft_wrap=True)
        messages.append({"role": "user", "content": question})
        stream = client.stream(messages=messages, max_tokens=max_tokens, temperature=0)
        try:
            speeds.append(_show(stream, console))
        except InvalidRequestError as error:
            if error.field != "messages":
                raise
            console.print(
                "this model has no chat template: it goes on with a text instead\n", style="dim", soft_wrap=True
            )
            return []
        messages.append({"role": "assistant", "content": stream.answer.text})
    return speeds


def _continue(client: PagedClient, prompt: str, max_tokens: int, console: Console) -> Speed:
    console.print(prompt, style="bold", markup=False, end="", soft_wrap=True)
    return _show(client.stream(prompt, max_tokens=max_tokens, temperature=0.7, seed=1), console)


def _show(stream: Stream, console: Console) -> Speed:
    speed = Speed()
    for delta in stream:
        speed.take(delta)
        console.print(printable(delta.text), end="", markup=False, soft_wrap=True)
    console.print()
    return speed


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


def read_gauges(url: str) -> dict[str, float]:
    """`paged_…` series of a metrics page; labels other than the pool's state are dropped. Empty if the page cannot be
    read.
    """
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            page = answer.read().decode()
    except OSError:
        return {}
    gauges = {}
    for found in _METRIC.finditer(page):
        state = re.search(r'state="\w+"', found["labels"] or "")
        gauges[found["name"] + (f"{{{state[0]}}}" if state else "")] = float(found["value"])
    return gauges
