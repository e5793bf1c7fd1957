"""`paged demo`: one question over gRPC, the answer as it arrives, and what it took."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from dataclasses import dataclass, field

from rich.console import Console

from paged_backend.errors import EngineError
from paged_backend.launch import Server
from paged_client.asking import Speed, printable
from paged_client.client import PagedClient
from paged_client.errors import PagedError

DEMO_PROMPT = "Once upon a time"
_METRIC = re.compile(r"^(?P<name>paged_\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)
_HELD = 'paged_pages{state="held"}'
_CACHED = 'paged_pages{state="cached"}'
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.6  # gauges are published a few times a second
_ANSWER_SECONDS = 120.0


def run_demo(server: Server, prompt: str, max_tokens: int, console: Console) -> None:
    """Streams one answer to `console`, then prints tokens/s and what the pool held.

    Raises:
        EngineError: the server refused or broke off the answer.
    """
    console.print(prompt, style="bold", markup=False, end="", soft_wrap=True)
    speed = Speed()
    client = PagedClient(server.addresses.grpc_url, model=server.settings.model_name, timeout=_ANSWER_SECONDS)
    try:
        with client, PoolWatch(server.addresses.metrics_url) as pool:
            for delta in client.stream(prompt, max_tokens=max_tokens, temperature=0.7, seed=1):
                speed.take(delta)
                console.print(printable(delta.text), end="", markup=False, soft_wrap=True)
            console.print()
    except PagedError as error:
        raise EngineError(f"the server refused the question: {error}") from None
    console.print(f"\n{speed.answer()}", soft_wrap=True)
    console.print(pool.summary(), soft_wrap=True)


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
            f"{held:.0f} held at most, {utilisation:.0f} % of their slots with live tokens (utilisation)" if held else "none held when the gauges were read"
        )
        return f"pool: {total:.0f} pages of {self.last.get('paged_page_size', 0):.0f} tokens; {fullest}; {self.last.get(_CACHED, 0):.0f} cached now"


def read_gauges(url: str) -> dict[str, float]:
    """`paged_…` series of a metrics page; labels other than the pool's state are dropped. Empty if the page cannot be read."""
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
