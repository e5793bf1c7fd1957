"""One gateway before a tritonserver with two models: each is found and asked by its name, and a caller's trace goes
through gateway and server.
"""

from __future__ import annotations

import json
import queue
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

import numpy as np
import openai
import tritonclient.grpc as grpc

from paged_backend.server.launch import _forwarding
from tests.otlp_collector import Collector, collector
from tests.server.front_end_server import MODEL, FrontEndServer, serving
from tests.server.gateway_process import Gateway, gateway_to

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

SECOND = "second_llm"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield seen


@pytest.fixture(scope="module")
def server(spans: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, options={"otlp_traces_endpoint": spans.url}, arguments=_forwarding(spans.url)) as running:
        (repository,) = (path.parent for path in folder.rglob(MODEL) if (path / "config.pbtxt").is_file())
        shutil.copytree(repository / MODEL, repository / SECOND, symlinks=True)
        config = repository / SECOND / "config.pbtxt"
        config.write_text(config.read_text().replace(MODEL, SECOND))
        yield running


@pytest.fixture(scope="module")
def gateway(server: FrontEndServer, spans: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_to(server.grpc, tmp_path_factory.mktemp("gateway"), "--otlp-traces-endpoint", spans.url) as running:
        yield running


def names(client: Any) -> list[str]:
    return [model.id for model in client.models.list()]


def until_listed(client: Any, *expected: str) -> None:
    end = time.monotonic() + 30
    while names(client) != list(expected) and time.monotonic() < end:
        time.sleep(0.1)
    assert names(client) == list(expected)


def test_a_model_that_is_loaded_is_served_and_one_that_is_unloaded_is_not(
    server: FrontEndServer, gateway: Gateway
) -> None:
    with gateway.client() as client, closing(grpc.InferenceServerClient(server.grpc)) as triton:
        assert names(client) == [MODEL]
        triton.load_model(SECOND)
        until_listed(client, MODEL, SECOND)
        assert client.models.retrieve(SECOND).to_dict()["max_model_len"] == 512
        answers = [client.completions.create(model=name, prompt="tokens=5", max_tokens=5) for name in (MODEL, SECOND)]
        assert answers[0].choices[0].text == answers[1].choices[0].text and answers[1].model == SECOND
        triton.unload_model(SECOND)
        until_listed(client, MODEL)
        with pytest.raises(openai.InternalServerError) as away:
            client.completions.create(model=SECOND, prompt="tokens=5")
        assert (away.value.status_code, away.value.code) == (503, "not_ready")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="third", prompt="tokens=5")


def test_a_callers_trace_goes_through_gateway_and_server(gateway: Gateway, spans: Collector) -> None:
    with gateway.client() as client:
        answer = client.completions.create(
            model=MODEL,
            prompt="SESAME tokens=5",
            max_tokens=5,
            extra_headers={"traceparent": PARENT, "tracestate": "a=1"},
        )
    mine = spans.wait(7, TRACE_ID)
    by_name = {span.name: span for span in mine}
    door, request = by_name["POST /v1/completions"], by_name[f"text_completion {MODEL}"]
    assert (door.service, request.service) == ("paged-gateway", "paged")
    assert door.parent_id == SPAN_ID and request.parent_id == door.span_id
    assert {span.name for span in mine if span.parent_id == request.span_id} == {
        "tokenize",
        "queue",
        "prefill",
        "decode",
        "send",
    }
    assert door.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens == 5
    assert request.attributes["gen_ai.response.id"] == door.attributes["gen_ai.response.id"]
    assert door.start <= request.start and request.end <= door.end + 0.05
    assert b"SESAME" not in b"".join(spans.raw)


def test_triton_servers_own_endpoints_know_a_callers_trace(server: FrontEndServer, spans: Collector) -> None:
    """Over gRPC by forwarded metadata, over HTTP by members of the body."""
    by_metadata, by_member = (f"00-{letter * 32}-{SPAN_ID}-01" for letter in "ab")
    arrived: queue.Queue[Any] = queue.Queue()
    with closing(grpc.InferenceServerClient(server.grpc)) as triton:
        triton.start_stream(lambda result, error: arrived.put(error or result), headers={"traceparent": by_metadata})
        text = grpc.InferInput("text_input", [1], "BYTES").set_data_from_numpy(np.array([b"tokens=3"], np.object_))
        triton.async_stream_infer(MODEL, [text])
        assert not isinstance(arrived.get(timeout=20), Exception)
    body = {"text_input": "tokens=3", "traceparent": by_member}
    with urlopen(
        Request(f"http://{server.http}/v2/models/{MODEL}/generate", json.dumps(body).encode()), timeout=20
    ) as response:
        assert json.load(response)["text_output"]
    for letter in "ab":
        (whole,) = [span for span in spans.wait(6, letter * 32) if span.parent_id == SPAN_ID]
        assert whole.name == f"text_completion {MODEL}"
