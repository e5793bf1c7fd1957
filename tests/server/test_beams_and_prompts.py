"""Beam search, prompt_logprobs and allowed_token_ids through a real tritonserver, against transformers on the same
checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.frontend.prompt import load_tokenizer
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.server.launch import Server, ServerSettings
from tests.oracle import Oracle
from tests.server.calls import engine_pid, wait_for_metrics
from tests.server.served import served
from tests.server.test_many_sequences import ask

pytestmark = pytest.mark.server

PROMPT = "Once upon a time there was a clever baker called Mira. One day she"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {
        "num_pages": 200,
        "max_num_sequences": 16,
        "dtype": "float32",
        "speculation": "off",
        "max_model_len": 256,
        "max_batched_tokens": 48,
        "max_engine_restarts": 100,
    }
    with served(ServerSettings(instances=2, options=options)) as running:
        yield running


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model_folder())


TOKENIZER = load_tokenizer(demo_model_folder() / "tokenizer.json")
PROMPT_IDS = TOKENIZER.encode(PROMPT).ids
EOS_IDS = open_checkpoint(EngineConfig()).eos_ids


def generate(server: Server, sampling: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Over HTTP."""
    body = {
        "text_input": PROMPT,
        "exclude_input_in_output": True,
        "sampling_parameters": json.dumps(sampling),
        **fields,
    }
    with urlopen(
        Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", json.dumps(body).encode()), timeout=60
    ) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def beams_of(oracle: Oracle, width: int, n: int, max_tokens: int, **options: Any) -> list[tuple[list[int], float]]:
    """Token ids and total log-probabilities."""
    ids = torch.tensor([PROMPT_IDS])
    penalty = options.get("length_penalty", 1.0)
    with torch.inference_mode():
        out = oracle.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(EOS_IDS),
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    answers = []
    for tokens, score in zip(out.sequences[:, len(PROMPT_IDS) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(tokens) if token in EOS_IDS), len(tokens))
        answers.append((tokens[:end], score * end**penalty))
    return answers


# ---- beam search


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "options", [{}, {"length_penalty": 0.0, "early_stopping": True}], ids=["defaults", "early stopping"]
)
def test_beams_are_those_of_transformers(server: Server, oracle: Oracle, options: dict[str, Any], stream: bool) -> None:
    sampling = {"use_beam_search": True, "beam_width": 4, "n": 3, "max_tokens": 24, **options}
    expected = beams_of(oracle, 4, 3, 24, **options)
    texts, ids, totals = [b""] * 3, [[] for _ in range(3)], [0.0] * 3
    for piece in ask(server, sampling, stream=stream):
        at = 0
        for entry, index in enumerate(piece["sequence_index"]):
            count = piece["num_output_tokens"][entry]
            texts[index] += piece["text_output"][entry]
            ids[index] += piece["output_ids"][at : at + count]
            totals[index] = piece["cumulative_logprob"][entry]
            at += count
    assert ids == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(totals, [total for _, total in expected], atol=1e-3)
    assert [text.decode() for text in texts] == [
        TOKENIZER.decode(PROMPT_IDS + tokens)[len(TOKENIZER.decode(PROMPT_IDS)) :] for tokens in ids
    ]


def test_one_beam_is_greedy_and_the_best_beam_comes_alone(server: Server, oracle: Oracle) -> None:
    greedy = generate(server, {"temperature": 0, "max_tokens": 16})["text_output"]
    assert generate(server, {"use_beam_search": True, "beam_width": 1, "max_tokens": 16})["text_output"] == greedy
    best = generate(
        server,
        {"use_beam_search": True, "beam_width": 4, "max_tokens": 24},
        return_output_ids=True,
        return_finish_reason=True,
    )
    ((tokens, _),) = beams_of(oracle, 4, 1, 24)
    assert best["output_ids"] == tokens
    assert best["finish_reason"] == ("stop" if tokens[-1] in EOS_IDS else "length")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.5}, "use_beam_search and temperature: "),
        ({"guided_regex": "a"}, "use_beam_search and guided_regex: "),
        ({"n": 5}, "n: 5 is more than beam_width (4)"),
        ({"beam_width": 16, "max_tokens": 240}, "beam_width: 16 beams of up to 256 tokens may need"),
    ],
    ids=["temperature", "grammar", "n", "pages"],
)
def test_what_cannot_be_searched_is_an_invalid_argument(server: Server, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(HTTPError) as raised:
        generate(server, {"use_beam_search": True, "beam_width": 4, **sampling})
    assert raised.value.code == 400
    assert json.load(raised.value)["error"].startswith(message)


# in CI one dies under other answers: test_engine_death.py
@pytest.mark.long
def test_an_engine_that_dies_and_a_caller_who_leaves_change_no_search(server: Server, oracle: Oracle) -> None:
    sampling = {"use_beam_search": True, "beam_width": 8, "n": 2, "max_tokens": 150, "ignore_eos": True}
    (expected,) = ask(server, sampling)
    before = engine_pid(server.shm_prefix)
    assert before is not None
    answers: list[dict[str, Any]] = []
    running = threading.Thread(target=lambda: answers.extend(ask(server, sampling)))
    running.start()
    assert wait_for_metrics(server.addresses.metrics_url, lambda values: values['paged_requests{state="running"}'] == 8)
    os.kill(before, signal.SIGKILL)
    running.join()
    assert engine_pid(server.shm_prefix) != before
    assert answers == [expected]
    late = {
        "text_input": PROMPT,
        "sampling_parameters": json.dumps(sampling | {"request_deadline_seconds": 1.0, "max_tokens": 200}),
    }
    request = Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", json.dumps(late).encode())
    with pytest.raises(TimeoutError):
        urlopen(request, timeout=0.2)
    idle = lambda values: values['paged_requests{state="running"}'] == 0 and values['paged_pages{state="held"}'] == 0  # noqa: E731
    assert wait_for_metrics(server.addresses.metrics_url, idle, seconds=10.0)


# ---- prompt_logprobs


def check_prompt(oracle: Oracle, text: str, n: int) -> None:
    first, *entries = json.loads(text)
    assert first is None
    truth = torch.log_softmax(oracle.logits(PROMPT_IDS), -1)
    assert len(entries) == len(PROMPT_IDS) - 1
    for position, entry in enumerate(entries):
        own, *others = entry.items()
        assert int(own[0]) == PROMPT_IDS[position + 1]
        assert own[1]["decoded_token"] == TOKENIZER.decode([int(own[0])], skip_special_tokens=False)
        logprobs = truth[position]
        for token, told in (own, *others):
            assert told["logprob"] == pytest.approx(logprobs[int(token)].item(), abs=1e-4)
            assert abs(told["rank"] - 1 - int((logprobs > logprobs[int(token)] + 1e-4).sum())) <= 1
        assert len(entry) == n + (own[1]["rank"] > n)


@pytest.mark.parametrize("n", [0, 3])
def test_the_prompts_logprobs_are_those_of_transformers_cached_or_not(server: Server, oracle: Oracle, n: int) -> None:
    for _ in range(2):
        answer = generate(server, {"prompt_logprobs": n, "max_tokens": 1, "temperature": 0})
        check_prompt(oracle, answer["prompt_logprobs"], n)
    (whole,) = ask(server, {"n": 3, "best_of": 4, "seed": 1, "prompt_logprobs": n, "max_tokens": 5})
    check_prompt(oracle, whole["prompt_logprobs"][0].decode(), n)
    assert len(whole["text_output"]) == 3
    assert "prompt_logprobs" not in generate(server, {"max_tokens": 2})


def test_streamed_they_come_once_and_with_beams_too(server: Server, oracle: Oracle) -> None:
    for sampling in (
        {"n": 2, "seed": 3, "max_tokens": 8},
        {"max_tokens": 8},
        {"use_beam_search": True, "beam_width": 3, "max_tokens": 8},
    ):
        pieces = ask(server, sampling, stream=True, return_prompt_logprobs=True)
        (told,) = [piece["prompt_logprobs"] for piece in pieces if "prompt_logprobs" in piece]
        check_prompt(oracle, told[0].decode(), 0)


# ---- allowed_token_ids


def test_only_allowed_tokens_are_said(server: Server, oracle: Oracle) -> None:
    allowed = sorted(
        {
            TOKENIZER.encode(word, add_special_tokens=False).ids[0]
            for word in (" the", " a", " baker", " and", ".", " Mira", " she")
        }
    )
    tokens: list[int] = []
    for _ in range(12):
        logits = oracle.logits(PROMPT_IDS + tokens)[-1]
        tokens.append(max(allowed, key=lambda token: logits[token].item()))
    answer = generate(
        server, {"allowed_token_ids": allowed, "temperature": 0, "max_tokens": 12}, return_output_ids=True
    )
    assert answer["output_ids"] == tokens
    (drawn,) = ask(server, {"allowed_token_ids": allowed, "temperature": 2.0, "n": 4, "seed": 5, "max_tokens": 20})
    assert set(drawn["output_ids"]) <= set(allowed) and len(set(drawn["output_ids"])) > 2
    with pytest.raises(HTTPError) as raised:
        generate(server, {"allowed_token_ids": [5, 99_999]})
    assert json.load(raised.value)["error"].startswith("allowed_token_ids: 99999 is not a token of this model")


def test_a_chats_answer_is_no_more_than_that_and_a_special_token_can_be_its_stop_string(server: Server) -> None:
    def chat(**sampling: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        body = {
            "messages": json.dumps(messages),
            "return_finish_reason": True,
            "max_tokens": 60,
            "temperature": 0,
            "sampling_parameters": json.dumps(sampling),
        }
        with urlopen(
            Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", json.dumps(body).encode()), timeout=60
        ) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    ended = chat()
    assert ended["finish_reason"] == "stop", "the answer has no end: the test misses its point"
    assert ended["text_output"] and "17 + 25?" not in ended["text_output"]
    (end,) = (TOKENIZER.id_to_token(token_id) for token_id in EOS_IDS)
    assert chat(ignore_eos=True, stop=[end])["text_output"] == ended["text_output"]
    assert (
        chat(ignore_eos=True, stop=[end], include_stop_str_in_output=True)["text_output"] == ended["text_output"] + end
    )
    assert chat(ignore_eos=True)["finish_reason"] == "length"


def test_ranks_count_in_the_vocabulary(server: Server) -> None:
    banned = {str(PROMPT_IDS[-1]): -100} | {"5": -100}
    sampling = {"max_tokens": 4, "temperature": 5, "seed": 3, "logprobs": 2, "logit_bias": banned}
    entries = json.loads(generate(server, sampling, return_logprobs=True)["logprobs"])
    chosen = [next(iter(entry.values())) for entry in entries]
    assert all(len(entry) in (2, 3) for entry in entries)
    assert max(one["rank"] for one in chosen) > 20, "hot sampling takes unlikely tokens"
    assert [min(one["rank"] for one in entry.values()) for entry in entries] == [1] * 4
