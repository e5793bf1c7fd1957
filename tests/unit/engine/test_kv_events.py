"""What routers hear of the prefix cache: the truth, in order, no sooner than it is true, and in the words that vLLM's
KV events use.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from paged_backend.block_hashes import block_hashes_of
from paged_backend.config import EngineConfig, kv_event_addresses
from paged_backend.engine.engine import Engine
from paged_backend.engine.findable_pages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    FindablePages,
)
from paged_backend.engine.kv_event_publisher import KvEventPublisher
from paged_backend.errors import EngineError
from paged_backend.scheduler.kv_events import Forgotten, KvEvents, Note, Stored
from paged_backend.scheduler.scheduler import Scheduler
from tests.kv_engines import LIMITS, SIZE, Told, Wire
from tests.simulated_runner import SimulatedRunner


def _apply(events: list[Event], known: dict[int, int | None]) -> None:
    """A router's side: block → the one before it. Nothing may be told twice, removed without having been told, or
    follow what was not told.
    """
    for event in events:
        match event:
            case BlockStored():
                parent = event.parent_block_hash
                for block in event.block_hashes:
                    assert (parent is None or parent in known) and block not in known
                    known[block] = parent
                    parent = block
            case BlockRemoved():
                for block in event.block_hashes:
                    del known[block]
                    assert block not in known.values(), "a block that others follow is removed before them"
            case AllBlocksCleared():
                known.clear()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_who_hears_every_event_knows_what_can_be_found(seed: int, steps_ahead: int) -> None:
    told, dice = Told(steps_ahead), random.Random(seed)
    heads = [[dice.randrange(90) for _ in range(dice.randrange(4, 24))] for _ in range(4)]
    prompts = []
    for _ in range(40):
        prompts.append(
            (
                dice.choice(heads) + [dice.randrange(90) for _ in range(dice.randrange(1, 12))],
                dice.choice(["", "", "salt"]),
            )
        )
        told.ask(prompts[-1][0], dice.randrange(1, 16), prompts[-1][1])
        told.run(dice.randrange(6))
    told.run()
    pages, known, stored_anew = FindablePages(SIZE), {}, {}
    for notes in told.steps:
        _apply(pages.take(notes), known)
        pages.check()
    assert any(isinstance(note, Forgotten) for notes in told.steps for note in notes), (
        "nothing was evicted: the pool is too large for this test"
    )
    assert {page.key for page in pages._pages.values()} == set(told.cache._page_of[0])
    _apply(pages.reported(), stored_anew)
    assert stored_anew == known, "who comes late knows the same"
    for prompt, salt in prompts:
        assert _found_in(known, prompt, salt) == told.found(prompt, salt)


def _found_in(known: dict[int, int | None], prompt: list[int], salt: str) -> int:
    """Tokens of the prompt that a router knows to be there: it hashes as the server does."""
    hashes = block_hashes_of(np.array(prompt, np.int32), SIZE, cache_salt=salt)
    return SIZE * len(list(itertools.takewhile(known.__contains__, hashes)))


def test_a_page_is_told_with_its_tokens_and_the_page_before_it() -> None:
    told, pages = Told(), FindablePages(SIZE)
    told.ask(list(range(10)), max_tokens=1)
    told.run()
    (stored,) = pages.take(told.steps[0])
    assert isinstance(stored, BlockStored)
    assert (stored.token_ids, stored.block_size, stored.parent_block_hash, len(stored.block_hashes)) == (
        list(range(8)),
        SIZE,
        None,
        2,
    )
    assert stored.lora_name is None and stored.cache_salt is None
    told.ask([*range(16), 90], max_tokens=1)
    told.run()
    (longer,) = pages.take(told.steps[1])
    assert isinstance(longer, BlockStored)
    assert (longer.token_ids, longer.parent_block_hash) == (list(range(8, 16)), stored.block_hashes[-1])


def test_every_server_gives_the_same_tokens_the_same_hash_and_other_tenants_another() -> None:
    hashes = []
    for salt in ("", "", "x"):
        told = Told()
        told.ask(list(range(10)), max_tokens=1, salt=salt)
        told.run()
        (event,) = FindablePages(SIZE).take(told.steps[0])
        assert isinstance(event, BlockStored)
        hashes.append(event.block_hashes)
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_a_page_is_told_only_when_the_step_that_computes_it_has_been_committed() -> None:
    told = Told(steps_ahead=1)
    told.ask([*range(8), 90], max_tokens=8)
    told.engine.step()  # launched; its pages can be found by the next step's requests already
    assert told.cache._page_of[0] and not told.steps
    told.engine.step()  # commits the first
    assert isinstance(told.steps[0][0], Stored)


def test_a_step_sends_its_notes_at_once() -> None:
    told = Told()
    for first in range(4):
        told.ask([first] * 8, max_tokens=1)
    told.run(1)
    assert [len(notes) for notes in told.steps] == [4]


@pytest.mark.parametrize(
    ("root", "salt", "lora_name"),
    [
        ("salt ", None, None),
        ("salt of a", "of a", None),
        ("adapter 1a\0poet\0salt x\0y", "x\0y", "poet"),
        ("adapter 1a\0poet\0salt ", None, "poet"),
    ],
    ids=["nobody's", "a tenant's", "a tenant's with an adapter", "an adapter's"],
)
def test_tenant_and_adapter_are_named(root: str, salt: str | None, lora_name: str | None) -> None:
    steps: list[list[Note]] = []
    events = KvEvents(SIZE, steps.append)
    events.store([b"a" * 16], np.arange(4, dtype=np.int32), [0], root, lora_name)
    events.release(1, 1)
    (stored,) = FindablePages(SIZE).take(steps[0])
    assert isinstance(stored, BlockStored)
    assert (stored.cache_salt, stored.lora_name) == (salt, lora_name)


def test_pages_that_no_other_request_can_find_are_not_told() -> None:
    told = Told()
    told.ask(list(range(9)), family=7, skip_prefix_cache=True)
    told.run()
    assert told.cache._page_of[0]
    assert not told.steps


def test_a_page_whose_predecessor_is_gone_is_told_again_when_that_is_back() -> None:
    pages, keys = FindablePages(1), [b"1", b"2", b"3", b"4"]
    (stored,) = pages.take([Stored(keys, None, np.arange(4, dtype=np.int32).tobytes(), None, "")])
    assert isinstance(stored, BlockStored)
    one, two, three, four = stored.block_hashes
    assert pages.take([Forgotten([b"2"])]) == [BlockRemoved([four, three, two], "GPU")]
    assert pages.reported() == [AllBlocksCleared(), BlockStored([one], None, [0], 1, "GPU")]
    assert pages.take([Stored([b"2"], b"1", np.array([1], np.int32).tobytes(), None, "")]) == [
        BlockStored([two, three, four], one, [1, 2, 3], 1, "GPU")
    ]
    for key in (b"4", b"2", b"3", b"1", b"9"):
        pages.take([Forgotten([key])])
        pages.check()
    assert not len(pages) and pages.reported() == [AllBlocksCleared()] and not pages._followers


def test_an_engine_that_was_not_asked_keeps_no_notes() -> None:
    scheduler = Scheduler(LIMITS)
    engine = Engine(scheduler, SimulatedRunner(8, 24, SIZE, 64, 32), 0)
    assert engine._kv_events is None
    assert scheduler._running.pages._events is None and scheduler._running.pages._cache.on_forget is None


@pytest.mark.parametrize("value", ["x", "0", "65535", "tcp://:5557", "tcp://host", "ipc://", "http://host:1"])
def test_an_option_that_is_no_address_is_refused(value: str) -> None:
    with pytest.raises(
        EngineError, match="parameter 'kv_events': expected a port up to 65534, tcp://ADDRESS:PORT or ipc://PATH, got"
    ):
        EngineConfig.parse({"kv_events": value})


def test_addresses() -> None:
    assert kv_event_addresses("") is None
    assert kv_event_addresses("5557") == ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558")
    assert kv_event_addresses("tcp://*:70") == ("tcp://*:70", "tcp://*:71")
    assert kv_event_addresses("ipc:///run/kv") == ("ipc:///run/kv", "ipc:///run/kv.replay")


# ---- on the wire


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    wire = Wire(tmp_path)
    yield wire
    wire.close()


def _note(*tokens: int, salt: str = "", lora_name: str | None = None) -> Stored:
    return Stored(
        [b"%d" % token for token in tokens],
        None,
        np.repeat(np.array(tokens, np.int32), SIZE).tobytes(),
        lora_name,
        salt,
    )


def test_a_subscriber_reads_three_frames(wire: Wire) -> None:
    socket = wire.subscriber()
    assert msgspec.msgpack.decode(socket.recv_multipart()[2])[1] == [], "who comes is told a number at once"
    wire.publisher.send([_note(7, salt="mine", lora_name="poet"), Forgotten([b"7"])])
    wire.publisher.send([_note(8)])
    topic, number, body = socket.recv_multipart()
    _, following, _ = socket.recv_multipart()
    assert topic == b"" and int.from_bytes(following, "big") == int.from_bytes(number, "big") + 1
    seconds, (stored, removed), rank = msgspec.msgpack.decode(body)
    assert abs(seconds - time.time()) < 60 and rank == 0
    hashes = stored.pop("block_hashes")
    expected = {
        "type": "BlockStored",
        "parent_block_hash": None,
        "token_ids": [7] * SIZE,
        "block_size": SIZE,
        "medium": "GPU",
    }
    assert stored == expected | {"lora_name": "poet", "cache_salt": "mine"}
    assert removed == {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}


def test_missed_batches_are_told_again_from_the_number_asked_for(wire: Wire) -> None:
    for token in range(5):
        wire.publisher.send([_note(token)])
    ((last, events),) = wire.missed(0)  # from a number that never was: one batch that says it all
    assert [event["type"] for event in events] == ["AllBlocksCleared", *["BlockStored"] * 5]  # type: ignore[index]
    assert [number for number, _ in wire.missed(last - 1)] == [last - 1, last]
    assert wire.missed(last + 1) == []


def test_an_engine_that_follows_another_counts_on(tmp_path: Path) -> None:
    first = Wire(tmp_path)
    number = first.publisher._number
    first.close()
    second = Wire(tmp_path)
    assert second.publisher._number > number  # nanoseconds: more than the first could have numbered meanwhile
    second.close()


def test_an_address_that_is_taken_is_a_sentence(wire: Wire) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(EngineError, match=rf"kv_events: tcp://127.0.0.1:{port} cannot be used: Address already in use"):
        KvEventPublisher(context, f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}", SIZE)
    context.destroy(linger=0)


# ---- NVIDIA Dynamo listens


class Router:
    """Dynamo's own indexer, subscribed to engines."""

    def __init__(self) -> None:
        self._service = pytest.importorskip("dynamo.llm", reason="ai-dynamo-runtime is not installed").SelectionService(
            indexer_threads=1
        )

    async def listen(self, worker: int, wire: Wire) -> None:
        given = {
            "worker_id": worker,
            "model_name": "m",
            "endpoint": f"127.0.0.1:{worker}",
            "block_size": SIZE,
            "max_num_batched_tokens": 2048,
        }
        await self._service.upsert_worker(
            given | {"kv_events_endpoint": wire.addresses[0], "replay_endpoint": wire.addresses[1]}
        )

    async def known(self, worker: int, prompt: list[int], **tenant: str) -> int:
        """How many tokens of the prompt it believes a worker to have."""
        answer = await self._service.overlap_scores({"model_name": "m", "token_ids": prompt, **tenant})
        return sum(one["device_blocks"] * SIZE for one in answer["workers"] if one["worker_id"] == worker)

    async def hears(self, expected: int, worker: int, prompt: list[int], **tenant: str) -> None:
        """Waits until it knows so many tokens: events are on their way."""
        known, end = -1, time.monotonic() + 5
        while known != expected and time.monotonic() < end:
            known = await self.known(worker, prompt, **tenant)
            await asyncio.sleep(0.005)
        assert known == expected


@pytest.fixture
def two_wires(tmp_path: Path) -> Iterator[tuple[Wire, Wire]]:
    for name in "ab":
        (tmp_path / name).mkdir()
    wires = Wire(tmp_path / "a"), Wire(tmp_path / "b")
    yield wires
    for wire in wires:
        wire.close()


def test_dynamo_knows_of_every_prompt_what_the_prefix_cache_would_find(two_wires: tuple[Wire, Wire]) -> None:
    engines = [Told(1, publisher=wire.publisher) for wire in two_wires]
    dice = random.Random(3)
    heads = [[dice.randrange(90) for _ in range(20)] for _ in range(5)]
    prompts = [head[: dice.randrange(8, 21)] + [dice.randrange(90) for _ in range(9)] for head in heads * 12]

    def serve(share: list[list[int]]) -> None:
        for prompt in share:
            told = dice.choice(engines)
            told.ask(prompt, 6)
            told.run()

    async def compare() -> None:
        router = Router()
        await router.listen(0, two_wires[0])
        serve(prompts[:30])
        await router.listen(1, two_wires[1])  # late: what it missed is told
        serve(prompts[30:])
        compared = [told.found(prompt) for told in engines for prompt in prompts]
        assert 0 < sum(map(bool, compared)) < len(compared), (
            "every prompt is known, or none: this test compares nothing"
        )
        for worker, told in enumerate(engines):
            for prompt in prompts:
                await router.hears(told.found(prompt), worker, prompt)

    asyncio.run(compare())


def test_dynamo_keeps_tenants_apart_and_hears_of_an_engine_that_starts_again(
    two_wires: tuple[Wire, Wire], tmp_path: Path
) -> None:
    wire, prompt = two_wires[0], list(range(30, 43))

    async def compare() -> None:
        router = Router()
        told = Told(publisher=wire.publisher)
        told.ask(prompt, salt="a tenant's")
        told.run()
        await router.listen(1, wire)
        await router.hears(12, 1, prompt, cache_salt="a tenant's")
        assert await router.known(1, prompt) == await router.known(1, prompt, cache_salt="another's") == 0
        wire.publisher.close()
        wire.context.destroy(linger=0)  # waits for the sockets to be gone
        wire.context = zmq.Context()
        wire.publisher = KvEventPublisher(wire.context, *wire.addresses, SIZE)
        again = Told(publisher=wire.publisher)
        await router.hears(0, 1, prompt, cache_salt="a tenant's")
        again.ask(prompt)
        again.run()
        await router.hears(12, 1, prompt)

    asyncio.run(compare())
