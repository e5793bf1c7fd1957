"""One request's answer, between an engine's client that does nothing by itself and senders that write down."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import pytest

from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine_client.live_requests import Piece, Receiver
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.answer import Answer, Services
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.metrics import Tally
from paged_backend.frontend.prompt import PromptReader
from paged_backend.frontend.strand import Strand
from paged_backend.frontend.streamer import Streamer
from paged_backend.messages import Prompt, Ready
from paged_backend.request import Outputs, Request, SamplingParams

READY = Ready(str(demo_model_folder() / "tokenizer.json"), 4096, 2048, 2**20, 16, 2**16)


class Client:
    """Keeps who wants to hear of an answer."""

    def __init__(self) -> None:
        self.receivers: list[Receiver] = []

    def submit(self, prompt: Prompt, salt: str, arrival: float, receive: Receiver, *more: Any, **named: Any) -> int:
        self.receivers.append(receive)
        return len(self.receivers)

    def abort(self, request_id: int) -> None:
        pass


@pytest.fixture
def services() -> Iterator[Services]:
    config = EngineConfig.parse({})
    prompts = PromptReader(config, READY)
    with closing(prompts), closing(Streamer(0.05)) as streamer:
        yield Services(config, cast(Any, Client()), prompts, Tally(config, [READY]), streamer)


def _begun(services: Services, sent: list[tuple[Delta, bool]], sampling: SamplingParams) -> tuple[Answer, Receiver]:
    request = Request(
        text="Once", input_ids=None, sampling=sampling, outputs=Outputs(), stream=True, prepend_prompt=False,
        arrival=time.monotonic(),
    )  # fmt: skip

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        sent.extend((delta, final) for delta in deltas)

    answer = Answer(services, request, send, lambda: False, lambda answer: None)
    answer.begin()
    (receive,) = cast(Client, services.client).receivers
    return answer, receive


def test_a_token_that_comes_while_another_thread_ends_the_answer_does_not_follow_its_end(services: Services) -> None:
    sent: list[tuple[Delta, bool]] = []
    answer, receive = _begun(services, sent, SamplingParams(max_tokens=9))
    receive(Piece((400,), num_cached_tokens=0))
    with services.streamer.together():
        receive(Piece((500,)))
        other = threading.Thread(target=answer.fail, args=(RequestError("too late", ErrorKind.CANCELLED),))
        other.start()
        other.join()
        receive(Piece((501,)))
    assert services.streamer.wait_until_all_ended(5)
    assert [final for _, final in sent] == [False] * (len(sent) - 1) + [True]
    assert str(sent[-1][0].error) == "too late"
    assert not any(501 in delta.token_ids for delta, _ in sent)


def test_the_engine_has_a_request_before_its_answers_text_is_prepared(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[int] = []  # so many were, at each preparation
    client = cast(Client, services.client)
    monkeypatch.setattr(Strand, "prepare", lambda strand: submitted.append(len(client.receivers)))
    sent: list[tuple[Delta, bool]] = []
    answer, _ = _begun(services, sent, SamplingParams(max_tokens=4))
    assert submitted == [1]
    answer.fail(RequestError("over", ErrorKind.INTERNAL))


def test_every_token_is_counted_once_whichever_way_it_takes(services: Services) -> None:
    """The first and the last have more to tell than the token; those between take the short way."""
    sent: list[tuple[Delta, bool]] = []
    _, receive = _begun(services, sent, SamplingParams(max_tokens=9))
    receive(Piece((400,), num_cached_tokens=7))
    for token_id in (401, 402):
        receive(Piece((token_id,)))
    receive(Piece((403, 404)))
    assert services.tally.drain().increments["paged_generation_tokens_total", ""] == 5
    receive(Piece((405,)))
    assert services.tally.drain().increments["paged_generation_tokens_total", ""] == 1
    _wait(lambda: sum(len(delta.token_ids) for delta, _ in sent) == 6)
    assert [token_id for delta, _ in sent for token_id in delta.token_ids] == [400, 401, 402, 403, 404, 405]
    assert {delta.num_cached_tokens for delta, _ in sent} == {7}


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
