"""Adapters through a real tritonserver: each request's tokens are those that PEFT gives alone, and what cannot be used
is refused alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from paged_backend.server.launch import Server, ServerSettings
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.server.calls import Answer, engine_pid, run_all, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

MAX_TOKENS = 12
ADAPTERS: dict[str, dict[str, Any]] = {
    "french": {"rank": 4, "lora_alpha": 8},
    "german.v2": {"rank": 7, "lora_alpha": 5, "targets": ("q_proj", "v_proj", "up_proj")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoint; the adapters lie beside it, three that cannot be used among them."""
    root = tmp_path_factory.mktemp("adapters")
    checkpoint = save_checkpoint(root / "model", "LlamaForCausalLM", num_hidden_layers=2)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        save_adapter(root / "adapters" / name, checkpoint, seed, **options)
    save_adapter(root / "adapters" / "wide", checkpoint, 5, rank=9, targets=("q_proj",))
    save_adapter(root / "outside", checkpoint, 6)
    os.symlink(root / "outside", root / "adapters" / "link")
    (root / "adapters" / "empty").mkdir()
    return checkpoint


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = {
        "lora_directory": str(folder.parent / "adapters"),
        "max_loras": 1,
        "max_lora_rank": 8,
        "num_pages": 200,
        "dtype": "float32",
        "speculation": "off",
        "max_engine_restarts": 100,
    }
    with served(ServerSettings(model=str(folder), instances=2, options=options)) as running:
        yield running


def asked(names: list[str | None], max_tokens: int = MAX_TOKENS) -> list[dict[str, Any]]:
    """The same prompts for each adapter."""
    return [
        {
            "input_ids": prompt.tolist(),
            "max_tokens": max_tokens,
            "sampling_parameters": {"temperature": 0, **({} if name is None else {"lora_name": name})},
        }
        for prompt in random_prompts((5, 40, 17))
        for name in names
    ]


def truth(folder: Path, requests: list[dict[str, Any]]) -> list[list[int]]:
    oracles = {None: Oracle(folder)} | {
        name: AdapterOracle(folder, folder.parent / "adapters" / name) for name in ADAPTERS
    }
    return [
        oracles[request["sampling_parameters"].get("lora_name")].greedy([request["input_ids"]], request["max_tokens"])[
            0
        ]  # type: ignore[index]
        for request in requests
    ]


def test_two_adapters_and_none_at_once_answer_as_peft_does_though_there_is_room_for_one(
    server: Server, folder: Path
) -> None:
    requests = asked([*ADAPTERS, None])
    expected = truth(folder, requests)
    assert len({tuple(answer) for answer in expected}) == len(expected), "the adapters change nothing"
    for _ in range(2):  # each takes the other's adapter slot again, and finds its own pages alone
        answers = run_all(server.addresses.grpc_url, requests)
        assert [answer.message for answer in answers] == [""] * len(requests)
        assert [answer.token_ids for answer in answers] == expected
    assert any(answer.num_cached_tokens for answer in answers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spanish", "'spanish': this server has no such adapter"),
        ("link", "'link': this server has no such adapter"),
        ("empty", "'empty': adapter_config.json is missing"),
        ("wide", "'wide': model.layers.0.self_attn.q_proj has rank 9, this server takes 1 to 8 (max_lora_rank)"),
        (
            "../outside",
            "'../outside' is not a plain name: it must not begin with '.' or hold '/', '\\' or control characters",
        ),
    ],
    ids=["unknown", "link", "empty", "rank", "path"],
)
def test_what_cannot_be_used_is_refused_with_its_reason_while_others_go_on(
    server: Server, folder: Path, name: str, message: str
) -> None:
    (request,) = [request for request in asked([name]) if len(request["input_ids"]) == 5]
    good = asked(["french"])[:1]
    bad, fine = run_all(server.addresses.grpc_url, [request | {"parameters": {"return_error_code": True}}, *good])
    assert bad.message == f"INVALID_ARGUMENT: lora_name: {message}"
    assert not any(other in bad.message for other in (*ADAPTERS, str(folder.parent)))
    assert fine.token_ids == truth(folder, good)[0]


def test_over_http_sequences_of_a_request_have_its_adapter(server: Server, folder: Path) -> None:
    def generate(**sampling: Any) -> dict[str, Any]:
        body = {
            "input_ids": asked([None])[0]["input_ids"],
            "max_tokens": 6,
            "sampling_parameters": json.dumps(sampling),
            "return_output_ids": True,
        }
        with urlopen(
            Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", json.dumps(body).encode()), timeout=60
        ) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    several = generate(n=3, seed=4, lora_name="french", temperature=0.01)["output_ids"]
    (expected,) = truth(folder, asked(["french"], 6)[:1])
    assert several == expected * 3
    with pytest.raises(HTTPError) as raised:
        generate(lora_name="spanish")
    assert raised.value.code == 400 and "no such adapter" in raised.value.read().decode()


@pytest.mark.long  # CI kills one under other answers; tests/e2e/test_adapters.py goes on with adapters
def test_an_engine_that_dies_changes_no_answer(server: Server, folder: Path) -> None:
    requests = asked([*ADAPTERS, None], max_tokens=60)
    expected = truth(folder, requests)
    before = engine_pid(server.shm_prefix)
    assert before is not None
    answers: list[Answer] = []
    running = threading.Thread(target=lambda: answers.extend(run_all(server.addresses.grpc_url, requests)))
    running.start()
    assert wait_for_metrics(server.addresses.metrics_url, lambda values: values['paged_requests{state="running"}'] > 2)
    os.kill(before, signal.SIGKILL)
    running.join()
    assert engine_pid(server.shm_prefix) != before
    assert [answer.message for answer in answers] == [""] * len(requests)
    assert [answer.token_ids for answer in answers] == expected


def test_the_log_tells_what_adapters_take(server: Server) -> None:
    assert re.search(
        r"adapters: room for 1 of rank 8 at most, [\d.]+ KiB each, [\d.]+ KiB in all \(max_loras, max_lora_rank\)",
        "\n".join(server.log_lines()),
    )
