"""The workers of a campaign: what each asks, how it listens, and what it finds."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from tests.chaos.judge import DEADLINE, QUEUE_FULL, Heard, judge
from tests.chaos.plague import Plague
from tests.chaos.wishes import (
    HOSTILE,
    NUM_PAGES,
    Wish,
)

_BACK_OFF_SECONDS = 2.0
_STUCK_SECONDS = 180.0  # an answer that takes longer is a fault
_BURST = 150
_KINDS = {
    "whole": 44,
    "unstreamed": 8,
    "slow": 6,
    "leave after": 10,
    "leave at": 10,
    "disconnect": 4,
    "deadline": 8,
    "hostile": 9,
    "burst": 0.2,
}


class Door(Protocol):
    """Where requests are asked: server_door.py, front_end_door.py."""

    transports: tuple[str, ...]
    broken: list[dict[str, Any]]

    async def ask(self, tensors: dict[str, Any], parameters: dict[str, Any], **how: Any) -> Heard: ...
    def numbers(self) -> dict[str, float]: ...
    def memory(self) -> dict[str, int]: ...
    def alive(self) -> bool: ...
    async def revive(self) -> None: ...
    def close(self) -> list[str]: ...


@dataclass(frozen=True)
class Plan:
    """What a campaign is asked to do. It ends after `seconds`, or when `requests` were answered and `kills` done, if
    that is sooner; 0: no limit.
    """

    door: str = "server"
    seconds: float = 60.0
    requests: int = 0
    kills: int = 0
    most_kills: int = 0  # 0: no limit
    seed: int = 1
    workers: int = 48
    kill_every: float = 6.0
    instances: int = 2
    refuse_pages: float = 0.02
    out_of_memory: float = 0.0002
    fork: bool = True
    leave: bool = True
    structured: bool = True
    pages: int = NUM_PAGES
    rows: int = 12
    layers: int = 1
    ranks: int = 1
    replicas: int = 1
    speculation: str = "off"
    only: int | None = None


class Pauses:
    """How long streams that had begun stood still because of a death: from the death to the next thing their callers
    heard.
    """

    def __init__(self, plague: Plague) -> None:
        self.seconds: list[float] = []
        self._plague = plague

    def listener(self) -> Any:
        """To be called whenever a caller hears something."""
        next_death: int | None = None  # None: nothing was heard yet, and waiting in the queue is no pause

        def note() -> None:
            nonlocal next_death
            deaths = self._plague.deadly_times
            if next_death is not None and next_death < len(deaths):
                self.seconds.append(time.monotonic() - deaths[next_death])
            next_death = len(deaths)

        return note


class Campaign:
    """Workers, and what they found."""

    def __init__(self, plan: Plan, door: Door, truth: list[tuple[Wish, Heard]], plague: Plague) -> None:
        self.kinds: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.tokens = 0
        self.pauses = Pauses(plague)
        self._plan, self._door, self._truth, self._plague = plan, door, truth, plague
        self._ends_at = time.monotonic() + plan.seconds if plan.seconds else None
        self._asked: dict[str, str] = {}  # name of a request under way -> what it asks
        self._bursts, self._num_bursts = 0, 0  # under way; so far

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def over(self) -> bool:
        plan = self._plan
        enough = (plan.requests or plan.kills) and self.requests >= plan.requests and self._plague.kills >= plan.kills
        return bool(enough or (self._ends_at and time.monotonic() > self._ends_at))

    @property
    def enough_kills(self) -> bool:
        return self.over or 0 < self._plan.most_kills <= self._plague.kills

    async def run(self) -> None:
        numbers = range(self._plan.workers) if self._plan.only is None else [self._plan.only]
        await asyncio.gather(*(self._work(number) for number in numbers))

    async def _work(self, worker: int) -> None:
        chance = random.Random(f"{self._plan.seed}/{worker}")
        number = 0
        while not self.over:
            number += 1
            kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
            if not self._plan.leave and kind in ("leave after", "leave at", "disconnect"):
                kind = "whole"
            self.kinds[kind] += 1
            name = f"worker {worker}, request {number}, {kind}"
            try:
                await asyncio.wait_for(self._once(kind, chance, name), _STUCK_SECONDS)
            except asyncio.TimeoutError:
                self.outcomes["stuck"] += 1
                broken = len(self._door.broken)
                await self._door.revive()
                if len(self._door.broken) == broken:  # the server is well, so it is our fault
                    self.fault(f"{name}: no end after {_STUCK_SECONDS:g} s: {self._asked.get(name)}")

    async def _once(self, kind: str, chance: random.Random, name: str) -> None:
        if kind == "hostile":
            await self._ask_nonsense(chance, name)
        elif kind == "burst":
            await self._burst(chance, name)
        else:
            wish, right = chance.choice(self._truth)
            transport = chance.choice(self._door.transports)
            sampling, how = _manner(kind, chance)
            await self._ask(wish, right, name, transport, sampling, how)

    async def _ask_nonsense(self, chance: random.Random, name: str) -> None:
        what, given, named = chance.choice(HOSTILE)
        tensors = {key: value for key, value in given.items() if key != "parameters"}
        heard = await self._door.ask(tensors, given.get("parameters", {}), note=lambda: None)
        if await self._went_with_the_server(heard):
            return
        self.outcomes["refused"] += 1
        if not any(reason in heard.error for reason in (named, QUEUE_FULL)) or heard.num_tokens or heard.after_final:
            self.fault(f"{name}, {what}: {heard}")

    async def _burst(self, chance: random.Random, name: str) -> None:
        """More at once than the queue holds."""
        wish, right = chance.choice([entry for entry in self._truth if entry[0].num_sequences == 1])
        self._bursts += 1
        self._num_bursts += 1
        try:
            await asyncio.gather(
                *(
                    self._ask(wish, right, f"{name} {number}", self._door.transports[0], {}, {})
                    for number in range(_BURST)
                )
            )
        finally:
            self._bursts -= 1

    async def _ask(
        self, wish: Wish, right: Heard, name: str, transport: str, sampling: dict[str, Any], how: dict[str, Any]
    ) -> None:
        may_end = [DEADLINE] if DEADLINE in sampling else []
        calm = not self._bursts
        num_bursts = self._num_bursts
        tensors = wish.with_sampling(**sampling)
        self._asked[name] = f"wish {wish.number} {tensors} {transport} {how}"
        heard = await self._door.ask(tensors, wish.parameters, note=self.pauses.listener(), transport=transport, **how)
        del self._asked[name]
        self.tokens += heard.num_tokens
        if await self._went_with_the_server(heard):
            return
        if not calm or self._num_bursts > num_bursts:
            may_end.append(QUEUE_FULL)
        left = bool(how.keys() & {"leave_after", "leave_at"})
        outcome, fault = judge(wish, right, heard, left=left, may_end=tuple(may_end))
        self.outcomes[outcome] += 1
        if QUEUE_FULL in outcome:
            # else those that are refused ask again at once, and are most of what is counted
            await asyncio.sleep(_BACK_OFF_SECONDS)
        if fault:
            self.fault(f"{name}, wish {wish.number} {tensors} {wish.parameters} {transport} {how}: {fault}")

    async def _went_with_the_server(self, heard: Heard) -> bool:
        if not heard.lost_with_server:
            return False
        self.outcomes["lost with the server"] += 1
        broken = len(self._door.broken)
        await asyncio.sleep(0.5)
        await self._door.revive()
        if len(self._door.broken) == broken and not self._door.broken:
            self.fault(f"the connection broke, and the server lives: {heard.lost_with_server}")
        return True

    def fault(self, what: str) -> None:
        self.faults.append(what[:3000])
        print(f"FAULT {what[:1000]}", file=sys.stderr, flush=True)


def _manner(kind: str, chance: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sampling parameters, how to ask)."""
    after, at, seconds = chance.uniform(0.001, 2.0), chance.randint(1, 30), chance.uniform(0.02, 3.0)
    match kind:
        case "unstreamed":
            return {}, {"stream": False}
        case "slow":
            return {}, {"slow": 0.03}
        case "leave after":
            return {}, {"leave_after": after}
        case "leave at":
            return {}, {"leave_at": at}
        case "disconnect":
            return {}, {"leave_at": at, "leave_after": after, "disconnect": True}
        case "deadline":
            return {DEADLINE: seconds}, {}
    return {}, {}
