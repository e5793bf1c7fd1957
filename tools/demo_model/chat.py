"""Conversations: questions and answers, how a system message bends the answers, and calls of tools. The template that
makes a prompt of them is in template.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

BOS = "<|bos|>"
EOS = "<|end|>"  # ends every turn
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)  # in the order of their ids
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
CALL, CALL_END = "<tool_call>", "</tool_call>"
THINK, THINK_END = "<think>", "</think>"
MARKERS = (CALL, CALL_END, THINK, THINK_END)  # a token each, which is text like any other


class Weight(Enum):
    """What a turn's words count in the training loss, as a code of two bits beside each token: see shards.py."""

    NONE = 0  # padding
    GIVEN = 1  # a user's or a system's words
    FREE = 2  # a story, a list: one of many good answers
    EXACT = 3  # the one right answer


@dataclass(frozen=True)
class Turn:
    role: str
    text: str
    weight: Weight = Weight.GIVEN
    kind: str = ""  # of a dialogue's answers: the evaluation counts by it


@dataclass(frozen=True)
class Answer:
    """What the assistant says, and how it can be checked."""

    kind: str  # what is tested: the evaluation counts by it
    full: str
    short: str | None = None  # the same without a sentence around it
    # words of an earlier turn from which it follows; None: nothing but the question is needed
    evidence: str | None = None
    exact: bool = True  # no other words are right
    verbatim: bool = False  # nothing may be put before or behind it: JSON
    check: tuple[str, ...] = ()  # of an answer that is not exact: the name of a check of `checks.py`, and what it needs


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the assistant's."""

    user: str
    answer: Answer
    in_short: bool = False  # the user asked for an answer without a sentence around it


@dataclass(frozen=True)
class Style:
    """What the system message asks of every answer."""

    system: str | None = None
    in_short: bool = False
    before: str = ""
    behind: str = ""

    def words_of(self, exchange: Exchange) -> str:
        """What the assistant says in this style."""
        answer = exchange.answer
        text = answer.short if (self.in_short or exchange.in_short) and answer.short is not None else answer.full
        return text if answer.verbatim else f"{self.before}{text}{self.behind}"


@dataclass(frozen=True)
class Conversation:
    """Exchanges in a style; with `text`, a plain text that nobody asked for (a story as a book has it)."""

    exchanges: tuple[Exchange, ...] = ()
    style: Style = field(default_factory=Style)
    text: str | None = None
    facts: frozenset[str] = frozenset()  # World.facts

    @property
    def turns(self) -> list[Turn]:
        """The system's turn if there is one, then user and assistant in turn."""
        turns = [] if self.style.system is None else [Turn("system", self.style.system)]
        for exchange in self.exchanges:
            weight = Weight.EXACT if exchange.answer.exact else Weight.FREE
            turns += [Turn("user", exchange.user), Turn("assistant", self.style.words_of(exchange), weight)]
        return turns


@dataclass(frozen=True)
class Dialogue:
    """Turns one by one, calls and tools' results among them. Where it thinks, it does so in the last turn: a prompt
    has no thoughts but those that are being thought.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # as OpenAI describes them; the system's turn has them already
    facts: frozenset[str] = frozenset()
    text: None = None

    @property
    def thinks(self) -> bool:
        return self.turns[-1].text.startswith(THINK)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL}\n{written}\n{CALL_END}"


def thought(words: str, answer: str) -> str:
    """An answer with what was thought before."""
    return f"{THINK}{words}{THINK_END}\n\n{answer}"


def rendered(turns: Sequence[Turn], opens_answer: bool = False) -> str:
    """What the chat template makes of the turns; `opens_answer`: with the opening of the assistant's turn."""
    return (
        BOS
        + "".join(f"{ROLE_TOKENS[turn.role]}{turn.text}{EOS}" for turn in turns)
        + (ASSISTANT if opens_answer else "")
    )


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as a chat client sends them."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def asked_briefly(exchange: Exchange, user: str) -> Exchange:
    """The same question in other words that ask for a short answer."""
    return replace(exchange, user=user, in_short=True)
