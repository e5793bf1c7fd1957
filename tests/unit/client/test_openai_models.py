"""Several models behind one gateway: each is asked by its name, and they come and go with what the servers have loaded.
Transports are scripts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import httpx

from paged_client import AsyncPagedClient, PagedError, UnknownModelError, UnreachableError, UnsupportedError
from paged_client.catalog import INPUTS, Catalog
from paged_client.openai import models as models_module
from paged_client.openai.gateway import Offer, make_app
from paged_client.openai.models import Models
from paged_client.openai.upstream import Discovery, Upstream
from tests.unit.client.gateway_calls import HI, Transport, described, piece


class Loaded:
    """What the servers say that they have loaded."""

    def __init__(self, *names: str) -> None:
        self.said: Sequence[str] | PagedError = names
        self.closed = False

    async def names(self) -> Sequence[str]:
        if isinstance(self.said, PagedError):
            raise self.said
        return self.said

    async def close(self) -> None:
        self.closed = True


class Served:
    """Models of which each has a transport of its own."""

    def __init__(self) -> None:
        self.transports: dict[str, Transport] = {}

    def connect(self, name: str) -> AsyncPagedClient:
        transport = self.transports[name] = Transport(piece(f"I am {name}", "stop"))
        transport.description = described(max_model_len=len(name), adapters=["french"] if name == "first" else [])
        client = AsyncPagedClient("nowhere:1", retries=0)
        client._transport = transport
        return client


async def asked(models: Models, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> httpx.Response:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(models, Offer())), base_url="http://test"
    ) as client:
        return await client.request(method, path, json=body)


def test_a_request_goes_to_the_model_that_it_names_and_all_are_listed() -> None:
    async def ask() -> None:
        served, loaded = Served(), Loaded("first", "second")
        async with Models(served.connect, {}, loaded) as models:
            await models.look()
            for name in ("first", "second"):
                chatted = await asked(models, "/v1/chat/completions", {"model": name, "messages": HI})
                assert chatted.json()["choices"][0]["message"]["content"] == f"I am {name}"
                completed = await asked(models, "/v1/completions", {"model": name, "prompt": "x"})
                assert completed.json()["choices"][0]["text"] == f"I am {name}" and completed.json()["model"] == name
            await asked(models, "/v1/completions", {"model": "first:french", "prompt": "x"})
            assert served.transports["first"].sampling["lora_name"] == "french"
            listed = (await asked(models, "/v1/models", method="GET")).json()["data"]
            facts = [(one["id"], one["parent"], one["max_model_len"]) for one in listed]
            assert facts == [
                ("first", None, 5),
                ("second", None, 6),
                ("first:french", "first", 5),
            ]
            unknown = await asked(models, "/v1/completions", {"model": "third", "prompt": "x"})
            assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
            vague = await asked(models, "/detokenize", {"tokens": [1]})
            assert (
                vague.status_code == 400
                and vague.json()["error"]["message"] == "model: missing; 2 are served: /v1/models names them"
            )
        assert loaded.closed

    asyncio.run(ask())


def test_models_come_and_go_with_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "_LOOK_SECONDS", 0.01)

    async def served_names(models: Models, *expected: str) -> None:
        for _ in range(500):
            if models.server_names() == list(expected):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(models.server_names())

    async def ask() -> None:
        served, loaded = Served(), Loaded()
        async with Models(served.connect, {}, loaded) as models:
            assert not await models.takes_requests()
            loaded.said = ["first"]
            await served_names(models, "first")
            assert await models.takes_requests()
            loaded.said = ["first", "second"]
            await served_names(models, "first", "second")
            loaded.said = UnreachableError("it is away for a while")
            await asyncio.sleep(0.05)
            await served_names(models, "first", "second")
            loaded.said = ["second"]
            await served_names(models, "second")
            served.transports["first"].events = (UnknownModelError("it is unloaded"),)
            away = await asked(models, "/v1/completions", {"model": "first", "prompt": "x"})
            assert (away.status_code, away.json()["error"]["code"]) == (503, "not_ready"), "it may be on its way back"
            assert (await asked(models, "/v1/completions", {"model": "third", "prompt": "x"})).status_code == 404
            assert (await asked(models, "/tokenize", {"prompt": "x"})).status_code == 200, (
                "the only one need not be named"
            )
            transport = served.transports["first"]
            loaded.said = ["first", "second"]
            await served_names(models, "first", "second")
            assert served.transports["first"] is transport, "its client is the one it had"

    asyncio.run(ask())


def test_a_server_with_one_ready_model_of_several_takes_requests() -> None:
    async def ask() -> None:
        served = Served()
        async with Models(served.connect, {"first": "first", "second": "second"}) as models:
            served.transports["first"].ready = False
            assert (await asked(models, "/health", method="GET")).status_code == 200
            served.transports["second"].ready = False
            assert (await asked(models, "/health", method="GET")).status_code == 503

    asyncio.run(ask())


class Repository:
    """A server with models of several backends."""

    def __init__(self, **models: frozenset[str]) -> None:
        self.models = models
        self.num_asked = 0

    async def ready_models(self) -> list[str]:
        if not self.models:
            raise UnreachableError("it is gone")
        return list(self.models)

    async def inputs_of(self, model: str) -> frozenset[str]:
        self.num_asked += 1
        return self.models[model]


def test_models_of_other_backends_are_left_out_and_each_is_asked_once() -> None:
    async def ask() -> None:
        gone = Repository()
        server = Repository(
            paged=INPUTS | {"stream"},
            vllm=frozenset({"text_input", "sampling_parameters", "stream"}),
            resnet=frozenset({"image"}),
        )
        catalog = Catalog()
        for _ in range(3):
            assert await catalog.look([gone, server]) == ["paged"]
        assert server.num_asked == 3
        with pytest.raises(UnreachableError, match="it is gone"):
            await catalog.look([gone])

    asyncio.run(ask())


def test_servers_that_do_not_say_what_they_have_are_asked_for_the_usual_model(caplog: pytest.LogCaptureFixture) -> None:
    """Their administrator has locked the repository's index."""

    async def ask() -> None:
        discovery = Discovery(["nowhere:1"])
        discovery._clients["nowhere:1"] = Locked()  # type: ignore[assignment]
        assert [await discovery.names() for _ in range(2)] == [["paged_llm"]] * 2

    asyncio.run(ask())
    assert caplog.text.count("it is locked: 'paged_llm' is served; --model-name names others") == 1


class Locked(Repository):
    async def ready_models(self) -> list[str]:
        raise UnsupportedError("it is locked")


def test_aliases_are_for_one_model() -> None:
    upstream = Upstream(["localhost:8001"])
    assert [(model.name, model.server_name) for model in upstream.models(["llm"], ["a", "b"]).all] == [
        ("a", "llm"),
        ("b", "llm"),
    ]
    with pytest.raises(ValueError, match="--served-name: for one model, and --model-name names 2"):
        upstream.models(["one", "two"], ["a"])
    with pytest.raises(ValueError, match="routing: 'luck' is none of kv, least, turns"):
        Upstream(["a:1", "b:1"], "luck").models([], [])
