"""Every wrong request gets its own clear error, and a stream that runs meanwhile does not notice."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as sync_grpc
import tritonclient.grpc.aio as grpc

from paged_backend.server.launch import Server, ServerSettings
from tests.server.calls import MODEL, Answer, stream
from tests.server.hostile_requests import CASES
from tests.server.served import served

pytestmark = pytest.mark.server

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(
        ServerSettings(
            instances=1,
            options={"num_pages": 64, "max_model_len": 512, "max_queue_size": 64, "speculation": "off"},
        )
    ) as running:
        yield running


async def among_others(address: str, case: dict[str, object]) -> tuple[Answer, Answer]:
    async with grpc.InferenceServerClient(address) as client:
        bystander = asyncio.create_task(
            stream(client, text_input="A bystander", max_tokens=24, sampling_parameters=GREEDY)
        )
        await asyncio.sleep(0.02)
        wrong = await asyncio.wait_for(stream(client, **case), 30)
        return wrong, await bystander


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("case", "named"), CASES.values(), ids=CASES)
def test_a_wrong_request_is_refused_alone(server: Server, case: dict[str, object], named: str) -> None:
    wrong, bystander = asyncio.run(among_others(server.addresses.grpc_url, case))
    message = wrong.message
    assert wrong.error is not None, wrong
    assert named in message, message
    assert len(message) < 1000 and "Traceback" not in message and ".py" not in message
    assert len(bystander.token_ids) == 24 and bystander.num_finals == 1


def test_a_tensor_of_the_wrong_type_or_shape_is_refused(server: Server) -> None:
    with sync_grpc.InferenceServerClient(server.addresses.grpc_url) as client:
        for name, array, kind in [
            ("max_tokens", np.array([1.5], np.float32), "FP32"),
            ("temperature", np.array([[1.0]], np.float32), "FP32"),
        ]:
            made = sync_grpc.InferInput(name, list(array.shape), kind)
            made.set_data_from_numpy(array)
            text = sync_grpc.InferInput("text_input", [1], "BYTES")
            text.set_data_from_numpy(np.array(["a"], object))
            errors: list[object] = []
            client.start_stream(lambda result, error, errors=errors: errors.append(error))
            client.async_stream_infer(MODEL, [text, made])
            client.stop_stream()
            assert errors and errors[0] is not None and name in str(errors[0])


def test_http_answers_a_wrong_request_with_400_and_the_reason(server: Server) -> None:
    body = json.dumps({"text_input": "a", "max_tokens": 0}).encode()
    call = urllib.request.Request(
        f"{server.addresses.http_url}/v2/models/{MODEL}/generate", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(call, timeout=30)
    assert caught.value.code == 400
    assert "max_tokens" in json.loads(caught.value.read())["error"]


def test_one_request_more_than_the_queue_holds_is_unavailable_and_the_others_finish(server: Server) -> None:
    async def flood() -> list[Answer]:
        async with grpc.InferenceServerClient(server.addresses.grpc_url) as client:
            requests = (stream(client, text_input="a", max_tokens=40, sampling_parameters=GREEDY) for _ in range(400))
            return await asyncio.wait_for(asyncio.gather(*requests), 120)

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.error is not None]
    assert all("max_queue_size" in answer.message for answer in refused), refused[:3]
    assert refused and len(refused) < 400
    assert all(len(answer.token_ids) == 40 and answer.num_finals == 1 for answer in answers if answer.error is None)
