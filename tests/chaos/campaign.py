"""Everything at once, for as long as asked: requests of every kind against a real tritonserver with a tiny pool while its engine is killed. Prints a JSON line.

    python -m tests.chaos.campaign --seconds 600 [--seed 1] [--workers 48] [--kill-every 6] [--instances 2]

What is right is asked first, one request at a time: tokens follow from a request and its seed alone. Then workers ask the same requests over and over, and
read them whole, or leave after a while or at some token, or read slowly, or do not stream, or ask for nonsense; meanwhile the engine gets SIGKILL, SIGSEGV or
SIGABRT, or is stopped for a while. Every answer that was read whole must have the right tokens, text and finish reasons and exactly one final response; of
those that were left, what came must be a beginning of it; nonsense must be refused, by name. In the end all pages must be free or cached, nothing may run, and
the memory of the server and its front ends must not have grown. A fault is printed with what it takes to ask the same again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.launch import Server, ServerSettings
from tests.bench.bench_streams import Memory
from tests.server.calls import metrics, tensor, wait_for_metrics

_STUCK_SECONDS = 120.0  # an answer that takes longer is a fault
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)
_NONSENSE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("temperature", {"text_input": "a", "sampling_parameters": {"temperature": -1}}),
    ("input_ids", {"input_ids": [10**6]}),
    ("max_tokens", {"text_input": "a", "max_tokens": 10**6}),
    ("temprature", {"text_input": "a", "sampling_parameters": {"temprature": 1}}),
    ("prompt", {"input_ids": [5] * 400}),
)


@dataclass(frozen=True)
class Wish:
    """A request that can be repeated."""

    number: int
    tensors: dict[str, Any]

    @property
    def num_sequences(self) -> int:
        return int(self.tensors["sampling_parameters"].get("n", 1))


@dataclass
class Heard:
    """What came of it, per sequence."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    finals: int = 0
    error: str = ""


def wishes(chance: random.Random) -> list[Wish]:
    """Prompts with and without common beginnings, of all lengths, and every way of sampling."""
    samplings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "stop": ["the", "Mira"]},
        {"temperature": 1.1, "seed": 5},
        {"temperature": 0.9, "top_p": 0.8, "seed": 6, "n": 3},
        {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 7},
        {"temperature": 1.0, "min_p": 0.05, "seed": 8, "logit_bias": {"20": 2.0}, "bad_words": ["house"], "n": 2},
        {"temperature": 0, "min_tokens": 1, "logprobs": 3},
    ]
    shared = "Once upon a time there was a clever baker called Mira. " * 4
    made = []
    for number in range(28):
        text = (shared if number % 2 else "") + f"Story {number}. " * chance.randint(1, 12)
        sampling = {**samplings[number % len(samplings)], "ignore_eos": number % 3 > 0}
        made.append(Wish(number, {"text_input": text, "max_tokens": chance.choice([1, 2, 15, 16, 17, 33, 60]), "sampling_parameters": sampling}))
    return made


async def ask(
    client: grpc.InferenceServerClient, tensors: dict[str, Any], *, stream: bool = True, leave_after: float = 0.0, leave_at: int = 0, slow: float = 0.0
) -> Heard:
    """One request over a stream of its own; leave_*: seconds, or tokens, after which the caller leaves. slow: seconds to sleep between responses."""
    heard = Heard()
    wanted = {"stream": stream, "return_output_ids": True, "return_finish_reason": True, "return_num_output_tokens": True, "return_sequence_index": True}
    inputs = [tensor(name, value) for name, value in {**tensors, **wanted, "exclude_input_in_output": True}.items()]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "paged_llm", "inputs": inputs, "enable_empty_final_response": True}

    responses = client.stream_infer(requests())

    async def listen() -> None:
        async for result, error in responses:
            if error is not None:
                heard.error = error.message()
                return
            _take(heard, result)
            if leave_at and sum(map(len, heard.token_ids.values())) >= leave_at:
                responses.cancel()
                return
            if slow:
                await asyncio.sleep(slow)

    try:
        await asyncio.wait_for(listen(), leave_after or None)
    except asyncio.TimeoutError:
        responses.cancel()
    except InferenceServerException as error:
        heard.error = error.message()
    return heard


def _take(heard: Heard, result: Any) -> None:
    heard.finals += result.get_response().parameters["triton_final_response"].bool_param
    texts = result.as_numpy("text_output")
    if texts is None:
        return
    ids, start = result.as_numpy("output_ids").tolist(), 0
    names = ("sequence_index", "text_output", "num_output_tokens", "finish_reason")
    columns = [result.as_numpy(name).tolist() for name in names]
    for index, text, count, reason in zip(*columns, strict=True):
        heard.texts[index] = heard.texts.get(index, "") + text.decode()
        heard.token_ids.setdefault(index, []).extend(ids[start : start + count])
        start += count
        if reason != b"None":
            heard.reasons[index] = reason.decode()


class Campaign:
    def __init__(self, address: str, truth: list[tuple[Wish, Heard]], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.tokens = 0
        self._address, self._truth, self._chance = address, truth, random.Random(seed)

    async def run(self, seconds: float, workers: int) -> None:
        until = time.monotonic() + seconds
        async with grpc.InferenceServerClient(self._address) as client:
            await asyncio.gather(*(self._work(client, until) for _ in range(workers)))

    async def _work(self, client: grpc.InferenceServerClient, until: float) -> None:
        while time.monotonic() < until:
            try:
                await asyncio.wait_for(self._once(client), _STUCK_SECONDS)
            except asyncio.TimeoutError:
                self._fault("stuck", f"no end after {_STUCK_SECONDS:g} s")

    async def _once(self, client: grpc.InferenceServerClient) -> None:
        chance = self._chance
        kind = chance.choices(("whole", "leave_after", "leave_at", "unstreamed", "slow", "nonsense"), (50, 12, 12, 12, 6, 8))[0]
        self.counts[kind] += 1
        if kind == "nonsense":
            name, tensors = chance.choice(_NONSENSE)
            heard = await ask(client, tensors)
            if name not in heard.error:
                self._fault(kind, f"{tensors} was answered with {heard}")
            return
        wish, right = chance.choice(self._truth)
        how: dict[str, Any] = {
            "leave_after": {"leave_after": chance.uniform(0.001, 2.0)},
            "leave_at": {"leave_at": chance.randint(1, 30)},
            "unstreamed": {"stream": False},
            "slow": {"slow": 0.05},
        }.get(kind, {})
        heard = await ask(client, wish.tensors, **how)
        self.tokens += sum(map(len, heard.token_ids.values()))
        self._compare(wish, right, heard, kind)

    def _compare(self, wish: Wish, right: Heard, heard: Heard, kind: str) -> None:
        what = f"wish {wish.number} {wish.tensors}, {kind}"
        if heard.error:
            self._fault(kind, f"{what}: {heard.error}")
        elif kind in ("leave_after", "leave_at") and heard.finals == 0:
            for index, ids in heard.token_ids.items():
                if right.token_ids[index][: len(ids)] != ids or not right.texts[index].startswith(heard.texts[index]):
                    self._fault(kind, f"{what}: sequence {index} began with {ids}, right is {right.token_ids[index]}")
        elif heard.finals != 1:
            self._fault(kind, f"{what}: {heard.finals} final responses")
        elif (heard.token_ids, heard.texts, heard.reasons) != (right.token_ids, right.texts, right.reasons):
            self._fault(kind, f"{what}: got {heard}, right is {right}")

    def _fault(self, kind: str, what: str) -> None:
        self.counts[f"faults: {kind}"] += 1
        self.faults.append(what[:2000])


def engine_pid(server: Server) -> int | None:
    """The server's engine process."""
    folder = server.shm_prefix.removesuffix("-").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if b"paged_backend.engine_process" in command and folder in command:
            return int(path.parent.name)
    return None


async def plague(server: Server, every: float, chance: random.Random, killed: Counter[str]) -> None:
    """Until cancelled: signals to the engine, some of them while it still loads."""
    while True:
        await asyncio.sleep(chance.expovariate(1 / every))
        pid, what = engine_pid(server), chance.choice(_SIGNALS)
        if pid is None:
            continue
        try:
            os.kill(pid, what)
            if what is signal.SIGSTOP:
                await asyncio.sleep(chance.uniform(0.1, 1.5))
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue
        killed[what.name] += 1


async def watch_memory(memory: Memory) -> None:
    while True:
        memory.sample()
        await asyncio.sleep(2)


def run_campaign(seconds: float, seed: int, workers: int, kill_every: float, instances: int) -> tuple[dict[str, Any], list[str]]:
    """(the report, the faults)."""
    chance = random.Random(seed)
    options = {"num_pages": "90", "max_num_sequences": "12", "max_model_len": "384", "max_batched_tokens": "96"}
    options |= {"dtype": "float32", "max_engine_restarts": "100000"}
    with Server(ServerSettings(instances=instances, options=options)) as server:
        address, metrics_url = server.addresses.grpc_url, server.addresses.metrics_url

        async def truth() -> list[tuple[Wish, Heard]]:
            async with grpc.InferenceServerClient(address) as client:
                return [(wish, await ask(client, wish.tensors)) for wish in wishes(chance)]

        right = asyncio.run(truth())
        alone = [(wish, heard) for wish, heard in right if heard.finals != 1 or heard.error]
        assert not alone, f"a request by itself fails: {alone[0]}"
        campaign, killed = Campaign(address, right, seed), Counter[str]()
        memory = Memory(server.pid, server.shm_prefix, without=b"paged_backend.engine_process")

        async def everything() -> None:
            beside = [asyncio.create_task(watch_memory(memory))]
            if kill_every:
                beside.append(asyncio.create_task(plague(server, kill_every, chance, killed)))
            await campaign.run(seconds, workers)
            for task in beside:
                task.cancel()

        started = time.monotonic()
        asyncio.run(everything())
        took = time.monotonic() - started

        def idle(values: dict[str, float]) -> bool:
            running = values['paged_requests{state="running"}'] + values['paged_requests{state="waiting"}']
            return running == 0 and values['paged_pages{state="held"}'] == 0

        if not wait_for_metrics(metrics_url, idle, seconds=20):
            campaign.faults.append(f"after the last request the engine is not idle: {metrics(metrics_url)}")
        values = metrics(metrics_url)
    num_requests = sum(count for kind, count in campaign.counts.items() if ":" not in kind)
    report: dict[str, Any] = {"bench": "chaos", "seed": seed, "seconds": round(took), "requests": num_requests}
    report |= {"tokens": campaign.tokens, "kinds": dict(campaign.counts), "signals": dict(killed), "restarts": int(values["paged_engine_restarts_total"])}
    report |= {"preemptions_of_the_last_engine": int(values["paged_preemptions_total"]), "faults": len(campaign.faults)}
    report |= {"resident": memory.change(memory.resident), "dev_shm": memory.change(memory.shared)}
    return report, campaign.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=48)
    parser.add_argument("--kill-every", type=float, default=6.0, help="mean seconds between signals to the engine; 0: none")
    parser.add_argument("--instances", type=int, default=2)
    args = parser.parse_args()
    report, faults = run_campaign(args.seconds, args.seed, args.workers, args.kill_every, args.instances)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    print(json.dumps(report), flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
