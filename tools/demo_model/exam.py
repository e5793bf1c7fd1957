"""The exam: conversations of held-out facts, how far each answer is from the words it follows from, and what open
answers must fulfil.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from tools.demo_model import thinking, tool_use, words
from tools.demo_model.chat import THINK, Answer, Conversation, Dialogue, Turn, Weight
from tools.demo_model.generator import conversation
from tools.demo_model.vocabulary import BOS_ID, EOS_ID, role_ids
from tools.demo_model.world import Split

SEED = "exam"
DIALOGUES = ("tools", "tools, thinking", "thinking")
FORMS = ("given", "told", "paper", "letter", "notes", "tasks", "talk", "memory", "long", "mixed")
DISTANCES = ((0, 256, "below 256"), (256, 1000, "256 to 1,000"), (1000, 1 << 30, "above 1,000"))  # tokens
_STORY_SENTENCES = 4


@dataclass(frozen=True)
class Item:
    """One answer of a conversation."""

    kind: str
    prompt_len: int  # tokens before the answer
    answer_ids: tuple[int, ...]  # EOS included
    distance: int | None  # tokens from the end of the evidence to the answer; None: nothing but the question is needed
    answer: Answer


@dataclass(frozen=True)
class Sitting:
    """A conversation as the model reads it, and the answers in it."""

    ids: tuple[int, ...]
    items: tuple[Item, ...]
    turns: tuple[Turn, ...]


def held_out(form: str, count: int) -> Iterator[Conversation]:
    """Conversations of a form, the same in every run."""
    for number in range(count):
        yield conversation(random.Random(f"{SEED} {form} {number}"), Split.HELD_OUT, form)


def held_out_dialogues(form: str, count: int) -> Iterator[Dialogue]:
    """Dialogues of one of DIALOGUES, the same in every run."""
    for number in range(count):
        rng = random.Random(f"{SEED} {form} {number}")
        if form == "thinking":
            yield thinking.dialogue(rng, Split.HELD_OUT)
        else:
            yield tool_use.dialogue(rng, Split.HELD_OUT, thinks="thinking" in form)


def dialogue_items(tokenizer: Tokenizer, found: Dialogue) -> tuple[list[int], list[tuple[str, int, list[int]]]]:
    """The dialogue's tokens; and of each turn with one right wording its kind, where it begins, and its tokens, EOS
    included. Where a prompt opens the thought, the turn begins behind that token.
    """
    roles, ids = role_ids(tokenizer), [BOS_ID]
    items: list[tuple[str, int, list[int]]] = []
    for turn in found.turns:
        ids.append(roles[turn.role])
        turn_ids = [*tokenizer.encode(turn.text, add_special_tokens=False).ids, EOS_ID]
        if turn.weight is Weight.EXACT:
            opened = int(turn.text.startswith(THINK))
            items.append((turn.kind, len(ids) + opened, turn_ids[opened:]))
        ids += turn_ids
    return ids, items


def sitting(tokenizer: Tokenizer, found: Conversation) -> Sitting:
    """The conversation's tokens, and where its answers are."""
    turns, roles = found.turns, role_ids(tokenizer)
    answers = iter([exchange.answer for exchange in found.exchanges])
    ids: list[int] = [BOS_ID]
    starts: list[int] = []
    items: list[Item] = []
    for number, turn in enumerate(turns):
        ids.append(roles[turn.role])
        starts.append(len(ids))
        turn_ids = [*tokenizer.encode(turn.text, add_special_tokens=False).ids, EOS_ID]
        if turn.role == "assistant":
            answer = next(answers)
            at = _evidence_end(tokenizer, turns[:number], starts[:number], answer.evidence)
            items.append(Item(answer.kind, len(ids), tuple(turn_ids), None if at is None else len(ids) - at, answer))
        ids += turn_ids
    return Sitting(tuple(ids), tuple(items), tuple(turns))


def _evidence_end(tokenizer: Tokenizer, turns: list[Turn], starts: list[int], evidence: str | None) -> int | None:
    """Which token the evidence ends with, where it was said last."""
    if evidence is None:
        return None
    for turn, start in zip(reversed(turns), reversed(starts), strict=True):
        if (at := turn.text.rfind(evidence)) >= 0:
            return start + len(tokenizer.encode(turn.text[: at + len(evidence)], add_special_tokens=False).ids)
    raise AssertionError(f"nobody said {evidence!r}")


def distance_name(distance: int) -> str:
    return next(name for least, end, name in DISTANCES if least <= distance < end)


# ---- what an open answer must fulfil


def fulfils(check: tuple[str, ...], text: str) -> bool:
    """Whether an answer that may be worded freely is a good one."""
    return _CHECKS[check[0]](text, *check[1:])


def _is_story(text: str, *wanted: str) -> bool:
    """Long enough, and about what it was to be about."""
    return len(re.findall(r"[.!?]", text)) >= _STORY_SENTENCES and all(word.lower() in text.lower() for word in wanted)


def _is_list(text: str, topic: str, count: str, form: str) -> bool:
    """So many different words of the topic, in the form asked for."""
    try:
        found = {
            "bullets": lambda: [line.removeprefix("- ") for line in text.split("\n")],
            "numbers": lambda: [line.split(". ", 1)[1] for line in text.split("\n")],
            "sentence": lambda: re.split(", | and ", text.rstrip(".")),
            "json": lambda: json.loads(text),
        }[form]()
    except (ValueError, IndexError):
        return False
    known = {word.lower() for word in words.TOPICS[topic]}
    return len(found) == int(count) == len(set(found)) and all(str(word).lower() in known for word in found)


def _is_json(text: str, *keys: str) -> bool:
    """An object with these keys."""
    value = parsed(text)
    return isinstance(value, dict) and list(value) == list(keys)


def _is_talk(text: str) -> bool:
    return bool(text)


def parsed(text: str) -> object:
    """What the JSON says; None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


_CHECKS: dict[str, Callable[..., bool]] = {"story": _is_story, "list": _is_list, "json": _is_json, "talk": _is_talk}
