"""n and best_of through a real tritonserver: each sequence is what a request of its own with the same seed would be,
whatever else the answer is made of.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc

from paged_backend.frontend.strand import SEED_STEP
from paged_backend.server.launch import Server, ServerSettings
from tests.server.calls import tensor, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

PROMPT = "Once upon a time there was a clever baker called Mira. One day she"
SEED = 2**63 + 5


@pytest.fixture(
    scope="module",
    params=["true", pytest.param("false", marks=pytest.mark.long)],
    ids=["prefix cache", "no prefix cache"],
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    options = {
        "num_pages": 400,
        "max_num_sequences": 16,
        "dtype": "float32",
        "speculation": "off",
        "max_model_len": 256,
        "prefix_cache": request.param,
    }
    with served(ServerSettings(instances=1, options=options)) as running:
        yield running


def ask(
    server: Server, sampling: dict[str, Any], stream: bool = False, leave_after: int | None = None, **tensors: Any
) -> list[dict[str, Any]]:
    """The responses: output tensors as lists."""

    async def talk() -> list[dict[str, Any]]:
        wanted = {
            "text_input": PROMPT,
            "stream": stream,
            "sampling_parameters": sampling,
            "exclude_input_in_output": True,
        }
        wanted |= {
            f"return_{name}": True
            for name in ("finish_reason", "num_output_tokens", "output_ids", "cumulative_logprob", "sequence_index")
        } | tensors
        inputs = [tensor(name, value) for name, value in wanted.items()]

        async def requests() -> Any:
            yield {"model_name": "paged_llm", "inputs": inputs, "enable_empty_final_response": True}

        got: list[dict[str, Any]] = []
        async with grpc.InferenceServerClient(server.addresses.grpc_url) as client:
            responses = client.stream_infer(requests())
            async for result, error in responses:
                assert error is None, error
                outputs = result.get_response().outputs
                got.append({output.name: result.as_numpy(output.name).tolist() for output in outputs})
                if leave_after is not None and len(got) >= leave_after:
                    responses.cancel()
                    break
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
        return [response for response in got if response]

    return asyncio.run(asyncio.wait_for(talk(), 60))


def alone(server: Server, index: int, **sampling: Any) -> dict[str, Any]:
    seed = (SEED + index * SEED_STEP) % 2**64
    (response,) = ask(server, {"seed": seed, "temperature": 1.2, "max_tokens": 16, **sampling})
    return response


def test_each_sequence_is_that_of_a_request_of_its_own(server: Server) -> None:
    (answer,) = ask(server, {"n": 4, "seed": SEED, "temperature": 1.2, "max_tokens": 16})
    singles = [alone(server, index) for index in range(4)]
    assert answer["text_output"] == [single["text_output"][0] for single in singles]
    assert len(set(answer["text_output"])) == 4
    assert answer["sequence_index"] == [0, 1, 2, 3]
    assert answer["num_output_tokens"] == [16] * 4
    assert answer["finish_reason"] == [b"length"] * 4
    ids = np.split(np.array(answer["output_ids"]), 4)
    assert [part.tolist() for part in ids] == [single["output_ids"] for single in singles]
    np.testing.assert_allclose(
        answer["cumulative_logprob"], [single["cumulative_logprob"][0] for single in singles], rtol=1e-4
    )


def test_streamed_pieces_name_their_sequence_and_add_up(server: Server) -> None:
    sampling = {"n": 3, "seed": SEED, "temperature": 1.2, "max_tokens": 16, "stop": ["the"]}
    (whole,) = ask(server, sampling)
    streams = [ask(server, sampling, stream=True) for _ in range(3)]
    for pieces in streams:
        texts, reasons = [b""] * 3, [b"None"] * 3
        for piece in pieces:
            assert piece["sequence_index"] == sorted(set(piece["sequence_index"]))
            for index, text, reason in zip(
                piece["sequence_index"], piece["text_output"], piece["finish_reason"], strict=True
            ):
                assert reasons[index] == b"None", "a piece after the sequence's end"
                texts[index] += text
                reasons[index] = reason
        assert texts == whole["text_output"]
        assert reasons == whole["finish_reason"]
    # a front end that gets no time on a busy machine sends what has piled up as one piece
    assert max(map(len, streams)) > 3


def test_best_of_gives_the_likeliest(server: Server) -> None:
    (answer,) = ask(server, {"n": 2, "best_of": 5, "seed": SEED, "temperature": 1.2, "max_tokens": 16})
    singles = sorted((alone(server, index) for index in range(5)), key=lambda single: -single["cumulative_logprob"][0])
    assert answer["text_output"] == [single["text_output"][0] for single in singles[:2]]
    assert answer["sequence_index"] == [0, 1]


def test_every_sequence_begins_with_the_prompt_unless_told_otherwise(server: Server) -> None:
    sampling = json.dumps({"n": 2, "seed": 1, "max_tokens": 5, "best_of": 3})
    body = json.dumps({"text_input": PROMPT, "sampling_parameters": sampling}).encode()
    with urlopen(Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", body), timeout=30) as response:
        texts = json.load(response)["text_output"]
    assert len(texts) == 2
    assert all(text.startswith(PROMPT) and len(text) > len(PROMPT) for text in texts)


def test_leaving_ends_all_sequences(server: Server) -> None:
    ask(server, {"n": 8, "temperature": 1.0, "max_tokens": 180, "ignore_eos": True}, stream=True, leave_after=3)

    def idle(values: dict[str, float]) -> bool:
        return values['paged_requests{state="running"}'] == 0 and values['paged_pages{state="held"}'] == 0

    started = time.monotonic()
    assert wait_for_metrics(server.addresses.metrics_url, idle, seconds=3.0), (
        f"still running after {time.monotonic() - started:.1f} s"
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.2, "presence_penalty": 1.5, "repetition_penalty": 1.2, "min_tokens": 20, "logprobs": 1},
        {"temperature": 1.2, "stop": ["e w", " and t"], "min_tokens": 9},
        {"temperature": 1.2, "guided_regex": r"[a-z]+( [a-z]+){9} \d{3}"},
    ],
    ids=["greedy", "penalties", "stop strings", "a grammar"],
)
def test_an_answer_goes_on_from_any_of_its_tokens(server: Server, sampling: dict[str, Any]) -> None:
    """As when the server that sent them has died: the caller's text is what it would have been."""
    wanted = {"seed": SEED, "max_tokens": 24} | sampling
    pieces = ask(server, wanted, stream=True)
    token_ids = [token_id for piece in pieces for token_id in piece["output_ids"]]
    sent, num_sent = "", 0
    assert len(pieces) > 5
    for piece in pieces[:-1]:
        sent, num_sent = sent + piece["text_output"][0].decode(), num_sent + piece["num_output_tokens"][0]
        if num_sent not in (1, 2, 7, 15, 16, 17, 23):
            continue
        rest = ask(server, wanted, stream=True, answer_ids=np.array(token_ids[:num_sent], np.int32))
        assert sent + "".join(one["text_output"][0].decode() for one in rest) == "".join(
            one["text_output"][0].decode() for one in pieces
        )
        assert [token_id for one in rest for token_id in one["output_ids"]] == token_ids[num_sent:]
        assert rest[-1]["finish_reason"] == pieces[-1]["finish_reason"]
