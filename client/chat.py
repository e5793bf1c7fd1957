"""`paged chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from paged_client.asking import (
    Sampling,
    SamplingOptions,
    ServerOptions,
    Speed,
    one_sentence_on_failure,
    printable,
    sampling_of,
)
from paged_client.client import PagedClient
from paged_client.ctrl_c import CtrlC
from paged_client.errors import InvalidRequestError, PagedError, UnreachableError
from paged_client.openai.formats.events import Call, Content, Event, Reasoning, message_of
from paged_client.option_groups import with_option_groups

if TYPE_CHECKING:
    from paged_client.chat_tools import Reading, Tool

_HELP = """/reset          forget the conversation, keep the system message
/system TEXT    set the system message and forget the conversation; without TEXT show it
/retry          ask the last question again
/help           this
/exit           leave, as Ctrl-D does
Ctrl-C          stops the answer, or the tool that runs; the conversation goes on"""
_PROMPT = "> "
_MOST_CALLS = 8  # answers that ask for tools, to one question


@with_option_groups
def chat(
    *,
    server: ServerOptions,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system message.")] = "",
    named: SamplingOptions,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A Python file whose public functions, with type hints, the model may call; you are asked before.",
        ),
    ] = None,
    tool_choice: Annotated[
        str,
        typer.Option(
            metavar="auto|required", help="required: each question is answered by a call, which a grammar enforces."
        ),
    ] = "auto",
    options: Sampling = None,
) -> None:
    """Talk to a running server's model.

    The conversation goes through the model's own chat template. Ctrl-C stops an answer, not the program. /help lists
    the commands. What the model thinks before it answers is shown dimmed.
    """
    # imports the gateway's reading of answers, which no other command needs: a third of the time that they start in
    from paged_client.chat_tools import CHOICES, load_tools, readings

    if tool_choice not in CHOICES:
        raise typer.BadParameter(f"'{tool_choice}' is none of {', '.join(CHOICES)}", param_hint="--tool-choice")
    sampling = sampling_of(named, options)
    if sampling.get("n", 1) != 1:
        raise typer.BadParameter(f"'n={sampling['n']}': a chat has one answer", param_hint="--sampling")
    with one_sentence_on_failure(), PagedClient(server.url, model=server.model_name) as client:
        if not client.is_ready():
            raise UnreachableError(
                f"no model '{server.model_name}' is ready at {server.url}: start a server with paged serve, "
                "or name yours with --url and --model-name"
            )
        known = {} if tools is None else load_tools(tools)
        reader = Reader(known, *readings(server.url, server.model_name, known, tool_choice, sampling))
        session = ChatSession(client, Conversation(system), reader, Console(highlight=False, markup=False))
        session.run()
        if session.failed:
            raise typer.Exit(1)


@dataclass(frozen=True)
class Reader:
    """The tools that there are, and how answers are asked for and read."""

    tools: Mapping[str, Tool]
    of_question: Reading
    of_result: Reading  # after a tool has answered


@dataclass
class Conversation:
    """The turns so far. The last one is the user's only while its answer is awaited."""

    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def call(self, text: str, calls: Sequence[Call]) -> None:
        functions = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": _parsed(call.arguments)},
            }
            for call in calls
        ]
        self.turns.append({"role": "assistant", "content": text, "tool_calls": functions})

    def result(self, call: Call, text: str) -> None:
        self.turns.append({"role": "tool", "tool_call_id": call.call_id, "name": call.name, "content": text})

    def take_back_question(self) -> str | None:
        """Removes the last question and what was answered to it; None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return str(turn["content"])
        return None


class ChatSession:
    """Reads lines until the end of input; everything that is not a command is a question."""

    def __init__(self, client: PagedClient, conversation: Conversation, reader: Reader, console: Console) -> None:
        self._client = client
        self._conversation = conversation
        self._reader = reader
        self._console = console
        self._interactive = sys.stdin.isatty()
        self._ctrl_c = CtrlC()
        self._any_failed = False

    @property
    def failed(self) -> bool:
        """Whether a question got no answer that a program asked; a person has seen it."""
        return self._any_failed and not self._interactive

    def run(self) -> None:
        if self._interactive:
            self._start_line_editor()
            self._note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.")
        with self._ctrl_c:
            while (line := self._read()) is not None:
                if line.startswith("/"):
                    if not self._command(*line[1:].split(maxsplit=1)):
                        return
                elif line:
                    self._talk(line)

    def _read(self) -> str | None:
        """A line; None at the end of input. Ctrl-C at the prompt throws away what was typed."""
        try:
            with self._ctrl_c.raises():
                return input(_PROMPT if self._interactive else "").strip()
        except EOFError:
            if self._interactive:
                self._console.print()
            return None
        except KeyboardInterrupt:
            self._console.print("\nCtrl-D leaves", style="dim")
            return ""

    def _command(self, name: str = "", text: str = "") -> bool:
        """False if it is time to leave."""
        conversation = self._conversation
        match name:
            case "exit" | "quit":
                return False
            case "reset":
                conversation.turns.clear()
                self._note("a new conversation")
            case "system" if text:
                conversation.system = text.strip()
                conversation.turns.clear()
                self._note("a new conversation with this system message")
            case "system":
                self._note(conversation.system or "no system message")
            case "retry":
                question = conversation.take_back_question()
                if question is None:
                    self._note("there was no question yet")
                else:
                    self._talk(question)
            case "help":
                self._note(_HELP)
            case _:
                self._note(f"unknown command /{name}\n{_HELP}")
        return True

    def _talk(self, question: str) -> None:
        """Asks, and goes on as long as the model asks for tools."""
        self._conversation.ask(question)
        reading = self._reader.of_question
        for _ in range(_MOST_CALLS):
            calls = self._listen(reading)
            if not calls:
                return
            for call in calls:
                self._conversation.result(call, self._run(call))
            reading = self._reader.of_result
        self._note(f"{_MOST_CALLS} calls for one question: it is left at that")

    def _listen(self, reading: Reading) -> list[Call]:
        """Shows an answer as it comes. Returns the calls that it makes."""
        conversation, speed = self._conversation, Speed()
        descriptions = [tool.description for tool in self._reader.tools.values()] or None
        stream = self._client.stream(messages=conversation.messages, tools=descriptions, **reading.sampling)
        parser, shown, events = reading.parser(), _Shown(self._console), list[Event]()
        try:
            with stream, self._ctrl_c.calls(stream.stop):
                for delta in stream:
                    speed.take(delta)
                    new = [Content(delta.text)] if parser is None else parser.feed(delta.text)
                    if parser is not None and delta.finish_reason:
                        new = [*new, *parser.finish()]
                    events += new
                    shown.take(new)
        except KeyboardInterrupt:  # the second
            stream.stop()
        except PagedError as error:
            self._fail(error, shown.begun)
            return []
        said, answer = message_of(events), stream.answer
        calls = [] if stream.stopped else list(said.calls)
        if calls:
            conversation.call(said.content.strip(), calls)
        elif answer.text:
            conversation.answer(said.content.strip())
        else:
            conversation.take_back_question()
        ended = "; cut off at max_tokens" if answer.finish_reason == "length" else ""
        if shown.begun or not calls:
            self._console.print()
        self._note(f"{'stopped: ' if stream.stopped else ''}{speed.line()}{ended}")
        return calls

    def _run(self, call: Call) -> str:
        """What the model is told of its call. Nothing is run unless a person says so."""
        tool = self._reader.tools.get(call.name)
        self._console.print(printable(f"{call.name}({call.arguments})"), style="bold", soft_wrap=True)
        if tool is None:
            found = f"error: there is no tool {call.name}"
        elif self._asked("run it? [y/N] "):
            found = self._outcome(tool, call)
        else:
            found = "error: the user does not allow this call"
        self._note(printable(found))
        return found

    def _outcome(self, tool: Tool, call: Call) -> str:
        try:
            with self._ctrl_c.raises():
                return tool.run(call.arguments)
        except KeyboardInterrupt:
            return "error: the user stopped this call"

    def _asked(self, question: str) -> bool:
        try:
            with self._ctrl_c.raises():
                return input(question if self._interactive else "").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

    def _fail(self, error: PagedError, begun: bool) -> None:
        """The question is forgotten: it can be asked again."""
        self._any_failed = True
        self._conversation.take_back_question()
        hint = (
            " (/reset begins a new conversation)"
            if isinstance(error, InvalidRequestError) and "tokens; the longest" in str(error)
            else ""
        )
        if begun:
            self._console.print()
        self._console.print(f"error: {printable(str(error))}{hint}", style="red", soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", soft_wrap=True)

    def _start_line_editor(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` arrow keys and history


class _Shown:
    """What of an answer is on the screen: thoughts dimmed, content plain, no space before either."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._style: str | None = None  # of what was shown last

    @property
    def begun(self) -> bool:
        return self._style is not None

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self._show(text, "")
                case Reasoning(text):
                    self._show(text, "dim")

    def _show(self, text: str, style: str) -> None:
        if style != self._style:
            text = text.lstrip()
            if text and self._style is not None:
                self._console.print()
        if text:
            self._style = style
            self._console.print(printable(text), end="", style=style or None, soft_wrap=True)


def _parsed(arguments: str) -> Any:
    """As chat templates expect them."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
