"""Conversations: questions and answers, how a system message bends the answers, and the one template that makes a
prompt of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

BOS = "<|bos|>"
EOS = "<|end|>"  # ends every turn
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, SYSTEM, USER, ASSISTANT)  # in the order of their ids
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

# A turn is its role's token, its words and EOS. An assistant's words go in as they came out, so that a history's tokens
# are those that were generated.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('role ' + message['role'] + ' is none of system, user and assistant') }}
{%- endif %}
{%- set words = namespace(said='') %}
{%- if message['content'] is string %}
{%- set words.said = message['content'] %}
{%- else %}
{%- for part in message['content'] or [] %}
{%- if part['type'] != 'text' %}
{{- raise_exception('a part of type ' + part['type'] + ' is not text') }}
{%- endif %}
{%- set words.said = words.said + part['text'] %}
{%- endfor %}
{%- endif %}
{{- '<|' + role + '|>' + (words.said if role == 'assistant' else words.said | trim) + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""


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

    @property
    def num_characters(self) -> int:
        return len(self.text or "") + sum(len(turn.text) for turn in self.turns)


def rendered(turns: Sequence[Turn], opens_answer: bool = False) -> str:
    """What CHAT_TEMPLATE makes of the turns; `opens_answer`: with the opening of the assistant's turn."""
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
