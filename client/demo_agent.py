"""`paged demo --tools`: an agent's loop with OpenAI's own library, before a gateway, as anybody would write it. What is
printed is what the model said, and what functions of this machine returned to it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paged_backend.errors import EngineError
from paged_backend.extras import install_command
from paged_backend.server.child import ServerChild
from paged_backend.server.launch import Server
from paged_client import demo_tools
from paged_client.asking import printable
from paged_client.async_client import AsyncPagedClient
from paged_client.chat_tools import Tool, tool_of
from paged_client.errors import PagedError
from paged_client.openai.formats.families import tool_format_of

if TYPE_CHECKING:
    from openai import OpenAI

# each with whether thoughts are asked for: before two calls at once the embedded model's are poor
AGENT_QUESTIONS: Mapping[str, bool] = {
    "There are 24 boxes with 36 eggs in each. How many eggs are there?": True,
    "What is the population of Riverton?": True,
    "What is the population of Oldport and of Thornby?": False,
    "Spell lantern.": True,
}
FUNCTIONS: tuple[Callable[..., Any], ...] = (demo_tools.calculate, demo_tools.get_population)
_MOST_ANSWERS = 5  # to one question, calls among them
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0
_ANSWER_SECONDS = 120.0
_POLL_SECONDS = 0.05
_LAST_LINES = 5
_THOUGHT_STYLE, _CALL_STYLE, _RESULT_STYLE, _NOTE_STYLE = "dim italic", "cyan", "green", "dim"
_READY = re.compile(r"OpenAI's API on (http://\S+?),")


def check_packages() -> None:
    """
    Raises:
        EngineError: a package is missing that the gateway or its caller needs.
    """
    try:
        import openai  # noqa: F401

        import paged_client.openai.starting  # noqa: F401
    except ImportError as error:
        raise EngineError(f"--tools: {error.name} is missing: {install_command('openai')} openai") from None


def run_agent_demo(server: Server, max_tokens: int, console: Console) -> None:
    """Asks questions, some of which need the tools, and shows what is thought, called, returned and answered, until
    there are no more or the server is told to stop.

    Raises:
        EngineError: the model knows no tools, the gateway did not start, or an answer broke off.
    """
    from openai import OpenAI, OpenAIError

    tools = {function.__name__: tool_of(function) for function in FUNCTIONS}
    model, url = server.settings.model_name, server.addresses.grpc_url
    try:
        asyncio.run(_check_template(url, model))
    except PagedError as error:
        if server.stopping:
            return
        raise EngineError(f"the server refused to describe its model: {error}") from None
    with gateway_before(url, lambda: server.stopping) as base_url:
        if base_url is None:
            return
        note = f"OpenAI's library asks {base_url}; it offers the model {', '.join(tools)} of {demo_tools.__file__}"
        shown = Shown(console)
        shown.line(f"{note}\n", _NOTE_STYLE)
        with OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=_ANSWER_SECONDS) as client:
            agent = Agent(client, model, tools, max_tokens, shown)
            try:
                for question, thinks in AGENT_QUESTIONS.items():
                    if server.stopping:
                        return
                    agent.ask(question, thinks)
            except OpenAIError as error:
                if not server.stopping:
                    raise EngineError(f"an answer broke off: {error}") from None


async def _check_template(url: str, model: str) -> None:
    """
    Raises:
        EngineError: the model's chat template says nothing of tools.
    """
    async with AsyncPagedClient(url, model=model) as client:
        templates = (await client.describe()).get("chat_templates") or {}
    if not any(tool_format_of(template) for template in templates.values()):
        raise EngineError("--tools: this model's chat template says nothing of tools, so it cannot be offered any")


@contextmanager
def gateway_before(url: str, stopping: Callable[[], bool]) -> Iterator[str | None]:
    """`paged openai` on a free port of this machine, as a child that ends with the block. Yields its base URL; None if
    `stopping` before it was ready.

    Raises:
        EngineError: it did not start.
    """
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    base_urls: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        base_urls.extend(_READY.findall(line))

    environment = {name: value for name, value in os.environ.items() if name != "PAGED_API_KEY"}
    command = [sys.executable, "-m", "paged_client.cli", "openai", "--url", url, "--port", "0"]
    child = ServerChild(command, environment, take)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not base_urls and not stopping():
            if child.wait(_POLL_SECONDS) is not None or time.monotonic() > deadline:
                raise EngineError(f"the gateway did not start: {' '.join(lines) or 'it said nothing'}")
        yield base_urls[0] if base_urls else None
    finally:
        child.send(signal.SIGTERM)
        if child.wait(_STOP_SECONDS) is None:
            child.kill_all()
            child.wait()


@dataclass
class Cost:
    """What the answers to one question took."""

    started: float = field(default_factory=time.monotonic)
    num_calls: int = 0
    num_tokens: int = 0
    num_thought: int = 0
    num_input: int = 0
    num_cached: int = 0

    def take(self, usage: Any, num_calls: int) -> None:
        """usage: of an answer, as OpenAI's library has it."""
        self.num_calls += num_calls
        self.num_tokens += usage.completion_tokens
        self.num_input += usage.prompt_tokens
        self.num_thought += getattr(usage.completion_tokens_details, "reasoning_tokens", None) or 0
        self.num_cached += getattr(usage.prompt_tokens_details, "cached_tokens", None) or 0

    def line(self) -> str:
        calls = f"{self.num_calls} {'call' if self.num_calls == 1 else 'calls'}"
        return (
            f"{calls}, {self.num_tokens} tokens ({self.num_thought} of them thought) in "
            f"{time.monotonic() - self.started:.1f} s; {self.num_cached} of {self.num_input} prompt tokens were cached"
        )


class Shown:
    """The answers on the screen: each part of one, such as a thought, begins on a line of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._style: str | None = None  # of the line that is not over

    def line(self, text: str, style: str = "") -> None:
        self.end()
        self._print(text, style, "\n")

    def part(self, text: str, style: str) -> None:
        """Goes on with the line if it has this style."""
        if style != self._style:
            text = text.lstrip()
        if text:
            if style != self._style:
                self.end()
            self._style = style
            self._print(text, style, "")

    def end(self, text: str = "") -> None:
        """text: the last of a line that is not over."""
        if self._style is not None:
            self._print(text, self._style, "\n")
        self._style = None

    def _print(self, text: str, style: str, end: str) -> None:
        self._console.print(printable(text), end=end, style=style or None, markup=False, soft_wrap=True)


class Agent:
    """A conversation with a model that may call functions. Greedy: the same questions, the same answers."""

    def __init__(self, client: OpenAI, model: str, tools: Mapping[str, Tool], max_tokens: int, shown: Shown) -> None:
        self._client = client
        self._tools = tools
        self._shown = shown
        self._asked: dict[str, Any] = {
            "model": model,
            "tools": [dict(tool.description) for tool in tools.values()],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._messages: list[dict[str, Any]] = []

    def ask(self, question: str, thinks: bool) -> None:
        """Shows everything up to the answer that calls nothing. thinks: before each answer."""
        self._shown.line(f"> {question}", "bold")
        self._messages.append({"role": "user", "content": question})
        cost = Cost()
        for _ in range(_MOST_ANSWERS):
            calls = self._answer(cost, thinks)
            for call in calls:
                found = self._run(call["function"])
                self._shown.line(f"→ {found}", _RESULT_STYLE)
                self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": found})
            if not calls:
                break
        self._shown.line(f"{cost.line()}\n", _NOTE_STYLE)

    def _answer(self, cost: Cost, thinks: bool) -> list[dict[str, Any]]:
        """Shows an answer as it comes, and takes it into the conversation. Returns the calls that it makes."""
        content, calls = "", list[dict[str, Any]]()
        thinking = {"chat_template_kwargs": {"enable_thinking": thinks}}
        for chunk in self._client.chat.completions.create(messages=self._messages, extra_body=thinking, **self._asked):
            if chunk.usage is not None:
                cost.take(chunk.usage, len(calls))
            for delta in (choice.delta for choice in chunk.choices):
                self._shown.part(getattr(delta, "reasoning_content", None) or "", _THOUGHT_STYLE)
                self._shown.part(delta.content or "", "")
                content += delta.content or ""
                for piece in delta.tool_calls or ():
                    self._take_call(piece, calls)
        self._shown.end(")" if calls else "")
        message = {"role": "assistant", "content": content.strip()}
        self._messages.append(message | {"tool_calls": calls} if calls else message)
        return calls

    def _take_call(self, piece: Any, calls: list[dict[str, Any]]) -> None:
        """piece: of a call; the first of each has its id and name, all have some of its arguments."""
        if piece.index == len(calls):
            self._shown.end(")" if calls else "")
            function = {"name": piece.function.name, "arguments": ""}
            calls.append({"id": piece.id, "type": "function", "function": function})
            self._shown.part(f"{piece.function.name}(", _CALL_STYLE)
        calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
        self._shown.part(piece.function.arguments or "", _CALL_STYLE)

    def _run(self, function: Mapping[str, str]) -> str:
        tool = self._tools.get(function["name"])
        return f"error: there is no tool {function['name']}" if tool is None else tool.run(function["arguments"])
