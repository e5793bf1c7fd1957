"""`paged chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from paged_client.asking import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    MaxTokens,
    ModelName,
    Sampling,
    Seed,
    Speed,
    Temperature,
    Url,
    one_sentence_on_failure,
    printable,
    sampling_of,
)
from paged_client.client import PagedClient
from paged_client.errors import InvalidRequestError, PagedError, UnreachableError

_HELP = """/reset          forget the conversation, keep the system message
/system TEXT    set the system message and forget the conversation; without TEXT show it
/retry          ask the last question again
/help           this
/exit           leave, as Ctrl-D does
Ctrl-C          stops the answer; the conversation goes on"""
_PROMPT = "> "


def chat(
    url: Url = DEFAULT_URL,
    model_name: ModelName = DEFAULT_MODEL,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system message.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    options: Sampling = None,
) -> None:
    """Talk to a running server's model.

    The conversation goes through the model's own chat template. Ctrl-C stops an answer, not the program. /help lists the commands.
    """
    sampling = sampling_of(options, max_tokens=max_tokens, temperature=temperature, seed=seed)
    if sampling.get("n", 1) != 1:
        raise typer.BadParameter(f"'n={sampling['n']}': a chat has one answer", param_hint="--sampling")
    with one_sentence_on_failure(), PagedClient(url, model=model_name) as client:
        if not client.is_ready():
            raise UnreachableError(f"no model '{model_name}' is ready at {url}: start a server with paged serve, or name yours with --url and --model-name")
        session = ChatSession(client, Conversation(system), sampling, Console(highlight=False, markup=False))
        session.run()
        if session.failed:
            raise typer.Exit(1)


@dataclass
class Conversation:
    """The turns so far. The last one is the user's only while its answer is awaited."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def take_back_question(self) -> str | None:
        """Removes the last question and what was answered to it; None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None


class ChatSession:
    """Reads lines until the end of input; everything that is not a command is a question."""

    def __init__(self, client: PagedClient, conversation: Conversation, sampling: dict[str, Any], console: Console) -> None:
        self._client = client
        self._conversation = conversation
        self._sampling = sampling
        self._console = console
        self._interactive = sys.stdin.isatty()
        self._any_failed = False

    @property
    def failed(self) -> bool:
        """Whether a question got no answer that a program asked; a person has seen it."""
        return self._any_failed and not self._interactive

    def run(self) -> None:
        if self._interactive:
            self._start_line_editor()
            self._note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(*line[1:].split(maxsplit=1)):
                    return
            elif line:
                self._talk(line)

    def _read(self) -> str | None:
        """A line; None at the end of input. Ctrl-C at the prompt throws away what was typed."""
        try:
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
        conversation, speed = self._conversation, Speed()
        conversation.ask(question)
        stream = self._client.stream(messages=conversation.messages, **self._sampling)
        stopped, begun = "", False
        try:
            with stream:
                for delta in stream:
                    speed.take(delta)
                    text = delta.text if begun else delta.text.lstrip()
                    begun = begun or bool(text)
                    self._console.print(printable(text), end="", soft_wrap=True)
        except KeyboardInterrupt:
            stopped = "stopped: "
        except PagedError as error:
            self._fail(error, begun)
            return
        answer = stream.answer
        if answer.text:
            conversation.answer(answer.text.strip())
        else:
            conversation.take_back_question()
        ended = "; cut off at max_tokens" if answer.finish_reason == "length" else ""
        self._console.print()
        self._note(f"{stopped}{speed.line()}{ended}")

    def _fail(self, error: PagedError, begun: bool) -> None:
        """The question is forgotten: it can be asked again."""
        self._any_failed = True
        self._conversation.take_back_question()
        hint = " (/reset begins a new conversation)" if isinstance(error, InvalidRequestError) and "tokens; the longest" in str(error) else ""
        if begun:
            self._console.print()
        self._console.print(f"error: {printable(str(error))}{hint}", style="red", soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", soft_wrap=True)

    def _start_line_editor(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` arrow keys and history
