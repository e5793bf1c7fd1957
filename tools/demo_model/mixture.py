"""What training reads: conversations alone, or together with calls of tools and thoughts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.demo_model import thinking, tool_use
from tools.demo_model.chat import Conversation, Dialogue
from tools.demo_model.generator import EARLY, MAIN, conversations
from tools.demo_model.world import Split

# Conversations, calls, thoughts: with about 330, 250 and 120 tokens each, 55, 30 and 15 % of the tokens; or 22, 59, 19.
_AGENTS = {"agents": (41, 29, 30), "agents, most of it calls": (15, 50, 35)}
MIXTURES = ("early", "conversations", *_AGENTS)


def mixture(name: str, seed: str, split: Split) -> Iterator[Conversation | Dialogue]:
    """Yields texts of one of MIXTURES without end. Same seed, same text."""
    if name not in _AGENTS:
        yield from conversations(seed, split, EARLY if name == "early" else MAIN)
        return
    rng = random.Random(f"{split.value} agents {seed}")
    old = conversations(f"agents {seed}", split, MAIN)
    while True:
        which = rng.choices(range(3), _AGENTS[name])[0]
        yield next(old) if which == 0 else (tool_use if which == 1 else thinking).dialogue(rng, split)
