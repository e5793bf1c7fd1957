"""Very many streams at once, many of which are left at every stage: the pages come back, and the streams left alone do
not notice.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import tritonclient.grpc.aio as grpc

from paged_backend.server.launch import Server, ServerSettings
from tests.server.calls import Answer, run_all, stream, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

NUM_STREAMS = {1: 256, 2: 128, 4: 256}  # by the number of front ends; two are CI's
PAGES_EACH = 2.5  # about half of what all of them together want: many wait, some are preempted
LONELY_CLIENT = """
import asyncio, sys
import tritonclient.grpc.aio as grpc
from tests.server.calls import stream
async def main():
    async with grpc.InferenceServerClient(sys.argv[1]) as client:
        asked = {"max_tokens": 200, "sampling_parameters": {"ignore_eos": True}}
        requests = (stream(client, text_input=f"Client {i} asks", **asked) for i in range(8))
        print("sent", flush=True)
        await asyncio.gather(*requests)
asyncio.run(main())
"""


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)],
    ids=["one front end", "two front ends", "four front ends"],
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    options = {
        "num_pages": int(PAGES_EACH * NUM_STREAMS[request.param]),
        "max_num_sequences": NUM_STREAMS[request.param] // 4,
        "dtype": "float32",
        "max_model_len": 512,
        "speculation": "off",
    }
    with served(ServerSettings(instances=request.param, options=options)) as running:
        yield running


def wishes(count: int) -> list[dict[str, object]]:
    chance = random.Random(1)
    return [
        {
            "input_ids": [chance.randrange(3, 300) for _ in range(chance.randint(1, 120))],
            "max_tokens": 24,
            "sampling_parameters": GREEDY,
        }
        for _ in range(count)
    ]


GREEDY = {"temperature": 0, "ignore_eos": True}


def pages_come_back(server: Server) -> bool:
    """Within two seconds nothing runs or waits, and free + cached = total."""

    def idle(values: dict[str, float]) -> bool:
        busy = values['paged_requests{state="running"}'] + values['paged_requests{state="waiting"}']
        return (
            busy == 0
            and values['paged_pages{state="free"}'] + values['paged_pages{state="cached"}']
            == values["paged_pages_total"]
            == server.settings.options["num_pages"]
        )

    return wait_for_metrics(server.addresses.metrics_url, idle, seconds=2.0)


async def storm(address: str, requests: list[dict[str, object]]) -> list[Answer]:
    """Every request of its own stream; three of four are left: at once, while queued or in prefill, at the n-th token,
    after the last.
    """
    chance = random.Random(2)
    leave = [
        {"leave_after": 0.0},
        {"leave_after": 0.05},
        {"leave_after": 0.4},
        {"leave_at_token": 1},
        {"leave_at_token": 12},
        {"leave_at_token": 24},
    ]
    calls = [request | (chance.choice(leave) if i % 4 else {}) for i, request in enumerate(requests)]
    async with grpc.InferenceServerClient(address) as client:
        return await asyncio.gather(*(stream(client, **call) for call in calls))


def test_cancelled_streams_free_their_pages_and_disturb_nobody(server: Server) -> None:
    num_streams = NUM_STREAMS[server.settings.instances]
    requests, some = wishes(num_streams), range(0, num_streams, num_streams // 4)
    alone = run_all(server.addresses.grpc_url, [requests[i] for i in some])  # before anybody else comes
    solo = {i: answer.token_ids for i, answer in zip(some, alone, strict=True)}
    victims = subprocess.Popen([sys.executable, "-c", LONELY_CLIENT, server.addresses.grpc_url], stdout=subprocess.PIPE)
    assert victims.stdout is not None and victims.stdout.readline()
    killed = asyncio.get_event_loop_policy().new_event_loop()
    try:
        killed.call_later(1.0, victims.send_signal, signal.SIGKILL)
        answers = killed.run_until_complete(storm(server.addresses.grpc_url, requests))
    finally:
        killed.close()
        victims.kill()
        victims.wait()
    for i in range(0, num_streams, 4):
        assert answers[i].error is None
        assert (
            len(answers[i].token_ids) == 24 and answers[i].num_finals == 1 and answers[i].finish_reasons[-1] == "length"
        )
    again = run_all(server.addresses.grpc_url, requests[::4])  # without the storm
    assert [answer.token_ids for answer in answers[::4]] == [answer.token_ids for answer in again]
    assert all(answers[i].token_ids == tokens for i, tokens in solo.items())
    assert pages_come_back(server)


def test_a_stream_left_while_queued_frees_its_place(server: Server) -> None:
    requests = [
        {"text_input": "a", "max_tokens": 400, "sampling_parameters": GREEDY, "leave_after": 0.5} for _ in range(128)
    ]
    run_all(server.addresses.grpc_url, requests)
    assert pages_come_back(server)
    (answer,) = run_all(
        server.addresses.grpc_url, [{"text_input": "b", "max_tokens": 3, "sampling_parameters": GREEDY}]
    )
    assert len(answer.token_ids) == 3
