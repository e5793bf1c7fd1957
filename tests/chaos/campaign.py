"""Everything at once, for as long as asked: requests of every kind against a tiny pool while the engine is killed.
Prints a JSON report.

    python -m tests.chaos.campaign --seconds 600 --seed 1                       # through a real tritonserver
    python -m tests.chaos.campaign --door front-end --requests 100000 --seed 1  # without a server around the front
    ends: more requests a second

What is right is asked first, one request at a time and without drafts: tokens follow from a request and its seed
alone. Then workers ask the same requests over and over, and read them whole, or leave (by cancelling, by closing the
or at some token), or read slowly, or do not stream, or give little time, or ask for nonsense, or for very much at once;
meanwhile the engine, or any of its ranks, gets SIGKILL, SIGSEGV or SIGABRT, or is stopped for a while or for ever,
finds no page or no memory (chaotic_engine.py). Every answer that was read whole must have the right tokens, text,
logprobs and finish reasons and exactly one final response; of those that broke off, what came must be a beginning of
it; nonsense must be refused, by name. Before every step the engine checks its pool and page tables (debug_checks). In
the end all pages must be free or cached, nothing may run, and memory and open files must not have grown.

A worker's requests follow from the seed alone; a fault says worker and number, `--only WORKER` asks the same again.
When the server itself dies or hangs (Triton Server 2.51.0 can, when a gRPC client leaves around the final response: its
issues 7840 and 8078), that is reported under `server_broken`, with its last log lines, and another server is started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paged_backend.config import demo_model_folder
from tests.chaos.chaotic_engine import Orders
from tests.chaos.front_end_door import FrontEndDoor
from tests.chaos.judge import DEADLINE, QUEUE_FULL, Heard, judge
from tests.chaos.nursery import Nursery
from tests.chaos.plague import Diary, Plague
from tests.chaos.server_door import ServerDoor
from tests.chaos.watch import Watch
from tests.chaos.wishes import (
    HOSTILE,
    MAX_MODEL_LEN,
    NUM_PAGES,
    Wish,
    long_wish,
    make_wishes,
    save_adapters,
    save_shallow,
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
_OPTIONS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_batched_tokens": 96,
    "max_queue_size": 120,
    "dtype": "float32",
    "max_engine_restarts": 10**6,
    "engine_hang_seconds": 8,
    "debug_checks": "true",
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


async def find_truth(door: Door, wishes: list[Wish]) -> list[tuple[Wish, Heard]]:
    truth = []
    for wish in wishes:
        heard = await door.ask(wish.with_sampling(speculation="off"), wish.parameters, note=lambda: None)
        assert heard.finals == 1 and not heard.error, f"a request by itself fails: {wish}: {heard}"
        truth.append((wish, heard))
    return truth


async def _wait_until_idle(door: Door, seconds: float) -> str:
    """What is still held or running then; nothing, if all is well."""
    deadline = time.monotonic() + seconds
    names = ("paged_requests/running", "paged_requests/waiting", "paged_pages/held")
    while True:
        numbers = door.numbers()
        if names[0] in numbers and not any(numbers[name] for name in names):
            return ""
        if time.monotonic() > deadline:
            return f"after the last request the engine is not idle: {numbers}"
        await asyncio.sleep(0.2)


async def _everything(plan: Plan, door: Door, diary: Diary) -> tuple[Campaign, Plague, Watch]:
    chance = random.Random(plan.seed)
    wishes = [*make_wishes(chance, plan.structured), long_wish()]
    truth = await find_truth(door, wishes)
    plague = Plague(diary, plan.kill_every, chance)
    campaign = Campaign(plan, door, truth, plague)
    watch = Watch(door, campaign, plague, diary)
    beside = [
        asyncio.create_task(watch.run()),
        *([asyncio.create_task(plague.run(lambda: campaign.enough_kills))] if plan.kill_every else []),
    ]
    await campaign.run()
    for task in beside:
        task.cancel()
    for task in await asyncio.gather(*beside, return_exceptions=True):
        if isinstance(task, Exception):
            raise task
    idle = await _wait_until_idle(door, 60)
    if idle:
        campaign.fault(idle)
    return campaign, plague, watch


def run_campaign(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """(the report, the faults)."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp")))
        orders = Orders(str(folder / "register"), plan.seed, plan.refuse_pages, plan.out_of_memory)
        diary = Diary(folder / "register")
        if plan.fork:
            command = stack.enter_context(Nursery(orders)).command
        else:
            command = [sys.executable, str(Path(__file__).with_name("chaotic_engine.py")), json.dumps(orders.__dict__)]
        save_shallow(folder / "model", demo_model_folder(), plan.layers)
        save_adapters(folder / "adapters", folder / "model")
        options = {
            **_OPTIONS,
            "model": str(folder / "model"),
            "num_pages": plan.pages,
            "max_num_sequences": plan.rows,
            "lora_directory": str(folder / "adapters"),
            "max_loras": 1,
            "tensor_parallel_size": plan.ranks,
            "replicas": plan.replicas,
            "speculation": plan.speculation,
        }
        door: Door = (ServerDoor if plan.door == "server" else FrontEndDoor)(options, plan.instances, command)
        started = time.monotonic()
        try:
            campaign, plague, watch = asyncio.run(_everything(plan, door, diary))
            took, numbers = time.monotonic() - started, door.numbers()
        finally:
            left = door.close()
        diary.read()
    for what in left:
        campaign.fault(f"left behind: {what}")
    for what in diary.faults:
        campaign.fault(f"the engine failed by itself: {what}")
    return _report(plan, took, campaign, plague, watch, diary, numbers, door), campaign.faults


def _report(
    plan: Plan,
    took: float,
    campaign: Campaign,
    plague: Plague,
    watch: Watch,
    diary: Diary,
    numbers: dict[str, float],
    door: Door,
) -> dict[str, Any]:
    pauses = sorted(campaign.pauses.seconds)
    shares = (
        {f"p{share}": round(pauses[min(len(pauses) - 1, len(pauses) * share // 100)], 2) for share in (50, 99, 100)}
        if pauses
        else {}
    )
    return {
        "bench": "chaos",
        **plan.__dict__,
        "seconds": round(took),
        "requests": campaign.requests,
        "tokens": campaign.tokens,
        "kinds": dict(campaign.kinds),
        "outcomes": dict(campaign.outcomes),
        "signals": dict(plague.signals),
        "kills": plague.kills + diary.counts["out_of_memory"],
        "restarts": int(numbers.get("paged_engine_restarts_total/", 0)),
        "mishaps": dict(diary.counts),
        "drafts": {name: int(numbers.get(f"paged_drafts_{name}_total/ngram", 0)) for name in ("proposed", "accepted")},
        "preemptions": int(numbers.get("paged_preemptions_total/", 0)),
        "streams_that_paused": len(pauses),
        "pause_seconds": shares,
        "memory": watch.growth(),
        "server_broken": door.broken,
        "faults": len(campaign.faults),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--door", choices=("server", "front-end"), default="server")
    parser.add_argument("--seconds", type=float, default=60, help="0: until --requests are done")
    parser.add_argument("--requests", type=int, default=0, help="0: until --seconds are over")
    parser.add_argument("--kills", type=int, default=0, help="at least so many, with --requests")
    parser.add_argument("--most-kills", type=int, default=0, help="so many at most; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=48)
    parser.add_argument(
        "--kill-every", type=float, default=6.0, help="mean seconds between signals to the engine; 0: none"
    )
    parser.add_argument("--instances", type=int, default=2, help="front ends")
    parser.add_argument(
        "--refuse-pages", type=float, default=0.02, help="share of the askings for pages that find none"
    )
    parser.add_argument("--out-of-memory", type=float, default=0.0002, help="share of steps that end the engine")
    parser.add_argument(
        "--no-fork",
        dest="fork",
        action="store_false",
        help="start engines as paged does, importing everything each time (nursery.py)",
    )
    parser.add_argument(
        "--nobody-leaves",
        dest="leave",
        action="store_false",
        help="no cancels: what a server of 2.51.0 does not always survive",
    )
    parser.add_argument(
        "--no-structured",
        dest="structured",
        action="store_false",
        help="no grammars: every engine that meets one imports torch once more",
    )
    parser.add_argument("--pages", type=int, default=NUM_PAGES, help="in the pool")
    parser.add_argument("--rows", type=int, default=12, help="sequences at once")
    parser.add_argument(
        "--layers",
        type=int,
        default=1,
        help="of the embedded model, which has 6: with fewer more is asked in the same time",
    )
    parser.add_argument("--ranks", type=int, default=1, help="tensor_parallel_size: any of them is killed")
    parser.add_argument("--replicas", type=int, default=1, help="any of them is killed")
    parser.add_argument(
        "--speculation", choices=("off", "ngram", "auto"), default="off", help="with drafts in flight at every death"
    )
    parser.add_argument("--only", type=int, help="one worker's requests, from a fault")
    parser.add_argument("--report", type=Path, help="a file for the report, with all faults")
    plan = parser.parse_args()
    path = plan.report
    del plan.report
    report, faults = run_campaign(Plan(**vars(plan)))
    if path is not None:
        path.write_text(json.dumps(report | {"all_faults": faults}, indent=1) + "\n")
    report["server_broken"] = [broken["server"] for broken in report["server_broken"]]
    print(json.dumps(report), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
