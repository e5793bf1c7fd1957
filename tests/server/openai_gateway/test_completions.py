"""Completions, tokens, embeddings; refusals; callers who leave."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")

import openai
from tokenizers import Tokenizer

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import Server
from paged_client import InvalidRequestError
from tests.server.calls import engine_pid, wait_for_metrics
from tests.server.gateway_process import KEY, Gateway, gateway_to
from tests.server.openai_gateway.questions import HI, PROMPT, direct

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

RUNNING = 'paged_requests{state="running"}'


def test_a_token_that_the_model_has_no_embedding_of_is_refused_by_name(server: Server, client: Any) -> None:
    """Not noticed by the device, which would end the engine; the operator was told at load."""
    pid = engine_pid(server.shm_prefix)
    with pytest.raises(InvalidRequestError, match=r"text_input: the text has the token '<pad>' \(id 4096\)"):
        direct(server, "hello <pad> there", max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=r"prompt: the text has the token '<pad>' \(id 4096\)"):
        client.completions.create(model="paged_llm", prompt="hello <pad> there", max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=r"messages: the text has the token '<added>' \(id 4097\)"):
        client.chat.completions.create(
            model="paged_llm", messages=[{"role": "user", "content": "hello <added> there"}], max_tokens=4
        )
    assert engine_pid(server.shm_prefix) == pid
    (warning,) = [line for line in server.log_lines() if "no embedding of" in line]
    assert "2 tokens" in warning and "'<pad>' (id 4096)" in warning


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_the_same_answer_whole_and_as_events(server: Server, gateway: Gateway) -> None:
    expected = direct(server, PROMPT, temperature=0, max_tokens=20).text
    asked = {"model": "paged_llm", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    command = ["curl", "-sN", f"{gateway.url}/completions", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-H", "Content-Type: application/json", "-d"]
    whole = json.loads(subprocess.check_output([*command, json.dumps(asked)], text=True))
    assert whole["choices"][0]["text"] == expected
    *events, done, end = subprocess.check_output([*command, json.dumps(asked | {"stream": True})], text=True).split(
        "\n\n"
    )
    assert (done, end) == ("data: [DONE]", "")
    assert "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events) == expected


def test_a_completion_is_the_servers_answer(server: Server, client: Any) -> None:
    expected = direct(server, PROMPT, temperature=0, max_tokens=20)
    answer = client.completions.create(model="paged_llm", prompt=PROMPT, temperature=0, max_tokens=20)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.usage.num_input_tokens, 20)
    assert answer.usage.total_tokens == expected.usage.num_input_tokens + 20
    for cached in (False, True):
        usage = client.completions.create(model="paged_llm", prompt=f"Another tale: {PROMPT}", max_tokens=1).usage
        assert (usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16) == cached


def test_a_streamed_completion_adds_up_to_the_whole(client: Any) -> None:
    asked = {"model": "paged_llm", "prompt": PROMPT, "n": 3, "seed": 7, "max_tokens": 12, "stop": ["the"], "echo": True}
    whole = client.completions.create(**asked)
    texts, reasons, usage, num_pieces = ["", "", ""], [None, None, None], None, 0
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            num_pieces += 1
    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith(PROMPT) for text in texts) and len(set(texts)) == 3
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert num_pieces > 6
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_prompts_may_be_many_and_token_ids(server: Server, client: Any) -> None:
    greedy = {"temperature": 0, "max_tokens": 6}
    expected = [direct(server, prompt, **greedy).text for prompt in ([5, 6, 7], [8, 9])]
    answer = client.completions.create(model="paged_llm", prompt=[[5, 6, 7], [8, 9]], **greedy)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == 5
    assert client.completions.create(model="paged_llm", prompt=[5, 6, 7], **greedy).choices[0].text == expected[0]
    texts = ["", ""]
    for chunk in client.completions.create(model="paged_llm", prompt=[[5, 6, 7], [8, 9]], stream=True, **greedy):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_logprobs_are_the_servers_streamed_and_whole(server: Server, client: Any) -> None:
    expected = direct(server, PROMPT, temperature=0, max_tokens=6, logprobs=3).logprobs
    asked = {"model": "paged_llm", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 3}
    logprobs = client.completions.create(**asked).choices[0].logprobs
    assert logprobs.tokens == [entry[0].text for entry in expected]
    assert logprobs.token_logprobs == pytest.approx([entry[0].logprob for entry in expected], abs=1e-4)
    assert [len(entry) for entry in logprobs.top_logprobs] == [3] * 6, "greedy: the chosen one is among the three"
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [token for piece in streamed for token in piece.tokens] == logprobs.tokens
    assert [offset for piece in streamed for offset in piece.text_offset] == logprobs.text_offset
    chat = {
        "model": "paged_llm",
        "messages": HI,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = client.chat.completions.create(**chat).choices[0].logprobs.content
    for token in content:
        assert (token.token, token.logprob, token.bytes) == (
            token.top_logprobs[0].token,
            token.top_logprobs[0].logprob,
            list(token.token.encode()),
        )
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    pieces = [piece.choices[0].logprobs for piece in client.chat.completions.create(**chat, stream=True)]
    assert [token.token for piece in pieces if piece for token in piece.content] == [token.token for token in content]


def test_an_echoed_prompt_has_log_probabilities_as_evaluations_read_them(server: Server, client: Any) -> None:
    """lm-evaluation-harness sends token ids, and adds up what the tokens after the context have."""
    expected = direct(server, PROMPT, temperature=0, max_tokens=1, prompt_logprobs=2).prompt_logprobs
    asked = {"model": "paged_llm", "temperature": 0, "logprobs": 2, "echo": True}
    root = client.with_options(base_url=str(client.base_url).removesuffix("/v1/"))
    ids = root.post("/tokenize", body={"prompt": PROMPT}, cast_to=object)["tokens"]
    for prompt in (PROMPT, ids):
        for max_tokens in (0, 1):
            answer = client.completions.create(**asked, prompt=prompt, max_tokens=max_tokens)
            choice = answer.choices[0]
            assert len(choice.logprobs.tokens) == len(ids) + max_tokens and answer.usage.completion_tokens == max_tokens
            assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
            told = choice.logprobs.token_logprobs[1 : len(ids)]
            assert told == pytest.approx([entry[0].logprob for entry in expected[1:]], abs=1e-4)
            assert "".join(choice.logprobs.tokens).endswith(choice.text[1:]) and PROMPT in choice.text
            assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
        chunks = list(client.completions.create(**asked, prompt=prompt, max_tokens=3, stream=True))
        streamed = [
            token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens
        ]
        whole = client.completions.create(**asked, prompt=prompt, max_tokens=3).choices[0]
        assert streamed == whole.logprobs.tokens
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text


def test_the_likeliest_of_several_and_keys_of_vllm(client: Any) -> None:
    asked = {"model": "paged_llm", "prompt": PROMPT, "seed": 5, "max_tokens": 8}
    tried = client.completions.create(**asked, n=4, logprobs=0).choices
    best = client.completions.create(**asked, n=1, best_of=4)
    assert best.choices[0].text == max(tried, key=lambda choice: sum(choice.logprobs.token_logprobs)).text
    first = client.completions.create(**asked, extra_body={"top_k": 1, "min_tokens": 8, "ignore_eos": True})
    assert first.choices[0].text == client.completions.create(**asked, temperature=0).choices[0].text
    banned = first.choices[0].text.split()[0]
    other = client.completions.create(**asked, temperature=0, extra_body={"bad_words": [banned]})
    assert not other.choices[0].text.startswith(f" {banned}")


def test_the_async_client_asks_many_at_once(server: Server, gateway: Gateway) -> None:
    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="paged_llm", prompt=PROMPT, seed=seed, max_tokens=10, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(seed) for seed in range(12))))

    assert asyncio.run(together()) == [direct(server, PROMPT, seed=seed, max_tokens=10).text for seed in range(12)]


def test_tokens_are_the_models_own(server: Server, gateway: Gateway, client: Any) -> None:
    root = client.with_options(base_url=gateway.url.removesuffix("/v1"))
    tokens = root.post("/tokenize", body={"prompt": PROMPT}, cast_to=object)
    greedy = {"model": "paged_llm", "temperature": 0, "max_tokens": 1}
    answer = client.completions.create(prompt=PROMPT, **greedy)
    assert tokens["count"] == len(tokens["tokens"]) == answer.usage.prompt_tokens
    assert client.completions.create(prompt=tokens["tokens"], **greedy).choices[0].text == answer.choices[0].text
    assert root.post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)["prompt"].endswith(PROMPT)
    chatted = root.post("/tokenize", body={"messages": HI}, cast_to=object)
    assert chatted["count"] == client.chat.completions.create(messages=HI, **greedy).usage.prompt_tokens
    assert client.models.retrieve("paged_llm").max_model_len == tokens["max_model_len"] == 2048
    with pytest.raises(openai.BadRequestError, match="tokens: 99999999 is not a token of this model"):
        root.post("/detokenize", body={"tokens": [99_999_999]}, cast_to=object)


@pytest.mark.parametrize(
    ("keys", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "expected float >= 0.0"),
        ({"max_tokens": 100_000}, "max_tokens", "longest sequence"),
        ({"n": 65}, "n", "expected int <= 64"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [99_999_999]}, "prompt", "is not a token"),
        ({"logprobs": 21}, "logprobs", "expected int <= 20"),
        ({"logit_bias": {"5": 1000}}, "logit_bias", "expected float <= 100.0"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3, "stream": True}, "best_of", "not possible with stream"),
        ({"extra_body": {"temperatur": 1}}, "temperatur", "did you mean 'temperature'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_must_be_changed_names_the_field(
    client: Any, keys: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.completions.create(**{"model": "paged_llm", "prompt": "x", **keys})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_a_prompt_that_is_too_long_has_openais_code(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="paged_llm", prompt=[5] * 100_000, stream=stream)
        assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


def test_unknown_models_and_keys_are_told_apart(gateway: Gateway, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["paged_llm"]
    assert client.models.retrieve("paged_llm").owned_by == "paged"
    for asked in (lambda: client.models.retrieve("x"), lambda: client.completions.create(model="x", prompt="x")):
        with pytest.raises(openai.NotFoundError) as missing:
            asked()
        assert missing.value.code == "model_not_found"
    with gateway.client(api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


def test_leaving_frees_the_pages(server: Server, client: Any) -> None:
    with client.completions.create(
        model="paged_llm", prompt=PROMPT, max_tokens=400, n=8, stream=True, extra_body={"ignore_eos": True}
    ) as answer:
        for number, _ in enumerate(answer):
            if number == 10:
                assert wait_for_metrics(server.addresses.metrics_url, lambda values: values[RUNNING] == 8)
                break
    assert wait_for_metrics(
        server.addresses.metrics_url,
        lambda values: values[RUNNING] == 0 and values['paged_pages{state="held"}'] == 0,
        seconds=5.0,
    )


def test_several_urls_answer_as_one(server: Server, tmp_path: Path) -> None:
    """One server by both of its services; three of them, and deaths, are in test_cluster.py."""
    expected = direct(server, PROMPT, temperature=0, max_tokens=20)
    with (
        gateway_to(
            server.addresses.grpc_url, tmp_path, "-u", server.addresses.http_url, "--routing", "turns"
        ) as running,
        running.client() as client,
    ):
        for _ in range(2):
            answer = client.completions.create(model="paged_llm", prompt=PROMPT, temperature=0, max_tokens=20)
            assert (answer.choices[0].text, answer.usage.prompt_tokens) == (
                expected.text,
                expected.usage.num_input_tokens,
            )
            pieces = client.completions.create(
                model="paged_llm", prompt=PROMPT, temperature=0, max_tokens=20, stream=True
            )
            assert "".join(piece.choices[0].text for piece in pieces) == expected.text
        assert client.models.retrieve("paged_llm").id == "paged_llm"
        request = Request(running.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urlopen(request, timeout=10) as response:
            text = response.read().decode()
    assert 'paged_gateway_servers{model="paged_llm",state="ready"} 2.0' in text
    assert re.findall(r"paged_gateway_requests_routed_total\{[^}]*\} (\S+)", text) == ["2.0", "2.0"]


def test_embeddings_are_transformers_last_hidden_states_and_documents_are_ranked(server: Server, client: Any) -> None:
    """A real engine, the server's own tensors, and OpenAI's library, which asks for base64."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    made = client.embeddings.create(model="paged_llm", input=[PROMPT, "The lamp is in the cupboard."])
    whole = client.embeddings.create(
        model="paged_llm", input=PROMPT, encoding_format="float", extra_body={"pooling": "mean", "normalize": False}
    )
    short = client.embeddings.create(model="paged_llm", input=PROMPT, dimensions=16)
    with torch.inference_mode():
        states = model(torch.tensor([tokenizer.encode(PROMPT).ids])).last_hidden_state[0]
    for found, expected in ((made, states[-1]), (whole, states.mean(0)), (short, states[-1][:16])):
        expected = expected if found is whole else expected / expected.norm()
        assert torch.allclose(
            torch.tensor(found.data[0].embedding), expected, atol=2e-5 * float(expected.abs().max()) + 1e-6
        )
    assert made.usage.total_tokens == sum(
        len(tokenizer.encode(text).ids) for text in (PROMPT, "The lamp is in the cupboard.")
    )
    with pytest.raises(openai.BadRequestError, match="dimensions: 100000 is more than this model's embeddings have"):
        client.embeddings.create(model="paged_llm", input="a", dimensions=100_000)
    asked = {"model": "paged_llm", "query": "Where is the lamp?", "documents": ["A fox.", "Where is the lamp?"]}
    first, second = client.post("/rerank", body=asked, cast_to=object)["results"]
    assert (first["index"], second["index"]) == (1, 0)
    assert first["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert second["relevance_score"] < 0.999
    with pytest.raises(
        openai.BadRequestError, match="scoring: the model's tokenizer spells yes or no in several tokens"
    ):
        client.post("/rerank", body={**asked, "scoring": "yes_no"}, cast_to=object)
