"""Everything at once, for as long as asked: requests of every kind against a tiny pool while the engine is killed.
Prints a JSON report.

    python -m tests.chaos.campaign --seconds 600 --seed 1                       # through a real tritonserver
    python -m tests.chaos.campaign --door front-end --requests 100000 --seed 1  # without a server around the front
    ends: more requests a second

What is right is asked first, one request at a time and without drafts: tokens follow from a request and its seed
alone. Then workers ask the same requests over and over, and read them whole, or leave (by cancelling or by closing the
connection, after a while or at some token), or read slowly, or do not stream, or give little time, or ask for nonsense,
or for very much at once; meanwhile the engine, or any of its ranks, gets SIGKILL, SIGSEGV or SIGABRT, or is stopped for
a while or for ever, or finds no page or no memory (chaotic_engine.py). Every answer that was read whole must have the
right tokens, text, logprobs and finish reasons and exactly one final response; of those that broke off, what came must
be a beginning of it; nonsense must be refused, by name. Before every step the engine checks its pool and page tables
(debug_checks). In the end all pages must be free or cached, nothing may run, and memory and open files must not have
grown.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from paged_backend.config import demo_model_folder
from tests.chaos.chaotic_engine import Orders
from tests.chaos.front_end_door import FrontEndDoor
from tests.chaos.judge import Heard
from tests.chaos.nursery import Nursery
from tests.chaos.plague import Diary, Plague
from tests.chaos.server_door import ServerDoor
from tests.chaos.watch import Watch
from tests.chaos.wishes import (
    MAX_MODEL_LEN,
    NUM_PAGES,
    Wish,
    long_wish,
    make_wishes,
    save_adapters,
    save_shallow,
)
from tests.chaos.workers import Campaign, Door, Plan

_OPTIONS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_batched_tokens": 96,
    "max_queue_size": 120,
    "dtype": "float32",
    "max_engine_restarts": 10**6,
    "engine_hang_seconds": 8,
    "debug_checks": "true",
}


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
        "drafts": {
            name.removeprefix("paged_drafts_").replace("_total/", " by "): int(value)
            for name, value in numbers.items()
            if name.startswith(("paged_drafts_proposed_total/", "paged_drafts_accepted_total/"))
        },
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
        help="of the embedded model, which has 6: with fewer more is asked in the same time, and every draft is right",
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
