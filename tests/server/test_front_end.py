"""Front ends in a real tritonserver, one and four, before an engine that answers what the test tells it to."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest
import tritonclient.grpc as grpc

from tests.server import fake_engine
from tests.server.front_end_server import MODEL, FrontEndServer, send, serving

pytestmark = pytest.mark.server
TOKENIZER = fake_engine.make_tokenizer()


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.long), 4], ids=["1 instance", "4 instances"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    # every request brings parameters of the server's
    forwarded = [f"--{protocol}-header-forward-pattern=x-.*|user-agent" for protocol in ("http", "grpc")]
    with serving(tmp_path_factory.mktemp("server"), instances=request.param, arguments=forwarded) as server:
        yield server


def _expected(prompt: str, num_tokens: int) -> str:
    return TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, prompt, num_tokens))


def _post(server: FrontEndServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://{server.http}/v2/models/{MODEL}/{path}", json.dumps(body).encode(), method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _streamed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def test_instances_share_one_engine(server: FrontEndServer) -> None:
    assert len(server.engine_pids()) == 1


def test_64_streams_at_once_are_each_complete_and_final_once(server: FrontEndServer) -> None:
    prompts = [f"tokens={20 + number} delay=0.00{number % 4} {number}" for number in range(64)]
    answers = server.ask_all(prompts, stream=True)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.error is None
        assert answer.num_finals == 1
        assert answer.text == _expected(prompt, 20 + number)
    # those whose sender is far behind may come whole
    assert sum(len(answer.texts) for answer in answers) > 2 * len(answers)


def test_the_final_flag_is_on_the_response_with_the_last_text(server: FrontEndServer) -> None:
    answer = server.ask("tokens=9 delay=0.005")
    assert answer.results[-1].get_response().parameters["triton_final_response"].bool_param
    assert answer.texts[-1]


def test_an_unstreamed_answer_is_one_response_with_the_prompt_unless_excluded(server: FrontEndServer) -> None:
    prompt = "tokens=9 delay=0.001"
    assert server.ask(prompt, stream=False).texts == [prompt + _expected(prompt, 9)]
    assert server.ask(prompt, stream=False, exclude_input_in_output=True).texts == [_expected(prompt, 9)]


def test_token_ids_can_be_sent_and_asked_for(server: FrontEndServer) -> None:
    ids = TOKENIZER.encode("tokens=9 delay=0.005").ids
    answer = server.ask("", input_ids=ids, stream=True, return_output_ids=True)
    assert answer.text == _expected("tokens=9 delay=0.005", 9)
    got = [token for result in answer.results for token in result.as_numpy("output_ids").tolist()]
    assert got == fake_engine.answer_ids(TOKENIZER, "tokens=9 delay=0.005", 9)


def test_without_detokenisation_the_answer_is_token_ids_in_every_response(server: FrontEndServer) -> None:
    prompt = "tokens=9 delay=0.005"
    for stream in (False, True):
        answer = server.ask(prompt, stream=stream, sampling_parameters=json.dumps({"detokenize": False}))
        assert answer.error is None and answer.text == ""
        got = [token for result in answer.results for token in result.as_numpy("output_ids").tolist()]
        assert got == fake_engine.answer_ids(TOKENIZER, prompt, 9)


def test_numbers_about_an_answer_are_sent_if_asked_for(server: FrontEndServer) -> None:
    extras = [
        "finish_reason",
        "cumulative_logprob",
        "logprobs",
        "num_input_tokens",
        "num_output_tokens",
        "num_cached_tokens",
    ]
    answer = server.ask("tokens=9 delay=0.005", **{f"return_{name}": True for name in extras})
    assert [result.as_numpy("finish_reason")[0] for result in answer.results] == [b"None"] * (
        len(answer.results) - 1
    ) + [b"length"]
    assert sum(result.as_numpy("num_output_tokens")[0] for result in answer.results) == 9
    assert answer.results[-1].as_numpy("cumulative_logprob")[0] == -4.5
    assert answer.results[0].as_numpy("num_input_tokens")[0] == len(TOKENIZER.encode("tokens=9 delay=0.005").ids)
    assert answer.results[0].as_numpy("num_cached_tokens")[0] == 3
    entries = [entry for result in answer.results for entry in json.loads(result.as_numpy("logprobs")[0])]
    assert [next(iter(entry.values()))["logprob"] for entry in entries] == [-0.5] * 9
    plain = server.ask("tokens=9")
    assert all(plain.results[0].as_numpy(name) is None for name in extras)


def test_a_stop_string_across_tokens_ends_the_answer_and_the_engines_work(server: FrontEndServer) -> None:
    prompt = "tokens=200 delay=0.01"
    answer = server.ask(prompt, stop_words=["😀 w0 w1"], return_finish_reason=True)
    assert answer.text == _expected(prompt, 200).partition("😀 w0 w1")[0]
    assert answer.results[-1].as_numpy("finish_reason")[0] == b"stop"
    server.wait_for('paged_requests{state="running"}', 0)


def test_the_text_of_the_end_token_is_not_sent(server: FrontEndServer) -> None:
    answer = server.ask("tokens=9 eos", return_finish_reason=True, sampling_parameters='{"skip_special_tokens": false}')
    assert answer.results[-1].as_numpy("finish_reason")[0] == b"stop"
    assert answer.text == _expected("tokens=9 eos", 8)


def test_request_parameters_count_too(server: FrontEndServer) -> None:
    answer = server.ask("tokens=99", parameters={"max_tokens": 5, "return_finish_reason": True})
    assert answer.text == _expected("tokens=99", 5)
    assert answer.results[-1].as_numpy("finish_reason")[0] == b"length"


def test_http_generate_stream_and_generate(server: FrontEndServer) -> None:
    prompt = "tokens=9 delay=0.005"
    status, text = _post(server, "generate_stream", {"text_input": prompt, "stream": True})
    assert status == 200
    assert "".join(event["text_output"] for event in _streamed(text)) == _expected(prompt, 9)
    status, text = _post(server, "generate", {"text_input": prompt, "max_tokens": 4, "temperature": 0})
    assert (status, json.loads(text)["text_output"]) == (200, prompt + _expected(prompt, 4))


def test_litellms_request_is_understood(server: FrontEndServer) -> None:
    body = {
        "text_input": "tokens=9",
        "parameters": {"max_tokens": 4, "bad_words": [""], "stop_words": [""]},
        "stream": False,
    }
    status, text = _post(server, "generate", body)
    assert (status, json.loads(text)["text_output"]) == (200, "tokens=9" + _expected("tokens=9", 4))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("text_input: the prompt is empty", {"prompt": ""}),
        ("the prompt has .* tokens; the longest this model takes is 511", {"prompt": "x y " * 1000}),
        ("text_input: the prompt has 5000000 bytes; the longest allowed is 4194304", {"prompt": "x" * 5_000_000}),
        ("text_input: not valid UTF-8", {"text_input": b"\xff"}),
        ("input_ids: 99999 is not a token", {"input_ids": [1, 99999]}),
        ("temperature: nan", {"temperature": float("nan")}),
        ("temperature: ", {"temperature": -1.0}),
        ("unknown sampling parameter 'foo'", {"sampling_parameters": '{"foo": 1}'}),
        ("unknown request parameter 'max_token': did you mean 'max_tokens'", {"parameters": {"max_token": 1}}),
        ("image: not served", {"image": [b"aGk="]}),
        ("nested too deeply", {"sampling_parameters": '{"stop":' + "[" * 10_000 + "]" * 10_000 + "}"}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens: 5000 is more than this model's longest sequence", {"max_tokens": 5000}),
        ("stop_words: 100000 strings", {"stop_words": ["x"] * 100_000}),
        ("exclude_input_in_output", {"exclude_input_in_output": False}),
    ],
)
def test_a_wrong_request_gets_one_error_that_says_why(
    server: FrontEndServer, message: str, options: dict[str, Any]
) -> None:
    answer = server.ask(**{"prompt": "tokens=3", **options})
    assert answer.num_finals == 1
    assert answer.error is not None
    assert answer.results == []
    with pytest.raises(Exception, match=message):
        raise answer.error
    assert server.ask("tokens=3").text == _expected("tokens=3", 3)


def test_what_the_server_and_other_clients_add_to_a_body_is_ignored(server: FrontEndServer) -> None:
    body = {
        "text_input": "tokens=3",
        "exclude_input_in_output": True,
        "id": "mine",
        "x-request-id": "7",
        "user-agent": "x",
        "model": "y",
        "stream_options": "",
    }
    status, text = _post(server, "generate", body)
    assert (status, json.loads(text)["text_output"]) == (200, _expected("tokens=3", 3)), text


def test_the_engines_refusal_reaches_the_caller(server: FrontEndServer) -> None:
    answer = server.ask("error")
    assert "the queue is full" in str(answer.error)
    assert answer.num_finals == 1


@pytest.mark.parametrize(("prompt", "code"), [("", "INVALID_ARGUMENT"), ("error", "UNAVAILABLE")])
def test_a_client_that_asks_for_grpc_errors_gets_the_code(server: FrontEndServer, prompt: str, code: str) -> None:
    """Without this header the server's gRPC streams carry an error's message only."""
    errors: queue.Queue[Any] = queue.Queue()
    with closing(grpc.InferenceServerClient(server.grpc)) as client:
        client.start_stream(lambda result, error: errors.put(error), headers={"triton_grpc_error": "true"})
        send(client, prompt, stream=True)
        assert errors.get(timeout=5).status() == f"StatusCode.{code}"


@pytest.mark.parametrize("prompt", ["silent", "tokens=400 delay=0.01"], ids=["queued", "streaming"])
def test_a_cancelled_stream_frees_its_request(server: FrontEndServer, prompt: str) -> None:
    before = server.wait_until_counted()['paged_requests_finished_total{reason="cancelled"}']
    with closing(grpc.InferenceServerClient(server.grpc)) as client:
        client.start_stream(lambda result, error: None)
        for number in range(10):
            send(client, prompt, request_id=str(number), stream=True)
        server.wait_for('paged_requests{state="running"}', 10)
        started = time.monotonic()
        client.stop_stream(cancel_requests=True)
        server.wait_for('paged_requests_finished_total{reason="cancelled"}', before + 10)
        server.wait_for('paged_requests{state="running"}', 0)
        assert time.monotonic() - started < 2


def test_a_request_cancelled_at_once_is_ended_wherever_it_is(server: FrontEndServer) -> None:
    for _ in range(5):
        with closing(grpc.InferenceServerClient(server.grpc)) as client:
            client.start_stream(lambda result, error: None)
            for number in range(10):
                send(client, "silent " * 50, request_id=str(number), stream=True)
            client.stop_stream(cancel_requests=True)
    time.sleep(0.3)
    server.wait_for('paged_requests{state="running"}', 0)


def test_an_http_client_that_hangs_up_frees_its_request(server: FrontEndServer) -> None:
    connection = HTTPConnection(server.http)
    connection.request(
        "POST",
        f"/v2/models/{MODEL}/generate_stream",
        json.dumps({"text_input": "tokens=400 delay=0.01", "stream": True}),
    )
    connection.getresponse().read(10)
    server.wait_for('paged_requests{state="running"}', 1)
    connection.close()  # the server notices at its next write
    server.wait_for('paged_requests{state="running"}', 0)


def test_killed_clients_leave_nothing_behind(server: FrontEndServer) -> None:
    code = f"""
        import sys, time
        sys.path.insert(0, {str(fake_engine.Path(__file__).parents[2])!r})
        import tritonclient.grpc as grpc
        from tests.server.front_end_server import send
        client = grpc.InferenceServerClient("{server.grpc}")
        client.start_stream(lambda result, error: None)
        for number in range(20):
            send(client, "silent" if number % 2 else "tokens=400 delay=0.01", request_id=str(number), stream=True)
        print("sent", flush=True)
        time.sleep(60)
    """
    client = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"sent\n"
    server.wait_for('paged_requests{state="running"}', 20)
    client.kill()
    client.wait()
    server.wait_for('paged_requests{state="running"}', 0, seconds=3)


def test_other_streams_are_unharmed_by_cancellations(server: FrontEndServer) -> None:
    with closing(grpc.InferenceServerClient(server.grpc)) as leaving:
        leaving.start_stream(lambda result, error: None)
        for number in range(20):
            send(leaving, "tokens=400 delay=0.002", request_id=str(number), stream=True)
        leaving.stop_stream(cancel_requests=True)
        prompts = [f"tokens=60 delay=0.002 {number}" for number in range(20)]
        for prompt, answer in zip(prompts, server.ask_all(prompts, stream=True), strict=True):
            assert answer.text == _expected(prompt, 60)


def test_metrics_carry_model_and_version_and_add_up(server: FrontEndServer) -> None:
    before = server.wait_until_counted()
    server.ask_all(["tokens=10 delay=0.001"] * 8, stream=True)
    after = server.wait_until_counted()
    finished = 'paged_requests_finished_total{reason="length"}'
    assert after[finished] - before[finished] == 8
    assert after["paged_generation_tokens_total"] - before["paged_generation_tokens_total"] == 80
    for name in (
        "paged_time_to_first_token_seconds_count",
        "paged_request_seconds_count",
        "paged_time_per_output_token_seconds_count",
    ):
        assert after[name] - before[name] == 8
    assert after["paged_pages_total"] == fake_engine.NUM_PAGES
    assert after['paged_pages{state="free"}'] + after['paged_pages{state="held"}'] == fake_engine.NUM_PAGES
    assert after["paged_queue_seconds_count"] > before["paged_queue_seconds_count"]
    assert after["paged_prefix_cache_hits_total"] == 48
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
        assert f'paged_page_size{{model="{MODEL}",version="1"}} 16' in page.read().decode()


def test_triton_servers_orca_header_can_be_made_of_our_metrics(server: FrontEndServer) -> None:
    """The pattern is orca_http.cc's; servers built with it send these numbers in each HTTP response."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
        text = page.read().decode()
    found = {
        dict(re.findall(r'(\w+)="([^"]*)"', labels))["kv_cache_block_type"]: float(value)
        for labels, value in re.findall(r"nv_trt_llm_kv_cache_block_metrics(?:{(.*?)})?\s*(\d+(?:\.\d+)?)", text)
    }
    assert found["max"] * found["tokens_per"] == fake_engine.NUM_PAGES * fake_engine.PAGE_SIZE
    assert 0 <= found["used"] / found["max"] <= 1
