"""The gateway's application, called as an ASGI server would, over a client whose transport is a script."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families as parse
from pydantic import ValidationError
from starlette.datastructures import Headers

from paged_client import (
    AsyncPagedClient,
    InvalidRequestError,
    PagedError,
    ServerError,
    UnavailableError,
    UnreachableError,
)
from paged_client.openai.answer_forms import FormOptions
from paged_client.openai.auth import usable_key
from paged_client.openai.connections import ConnectionLimits, Connections, say_failed_accepts
from paged_client.openai.errors import RefusalError
from paged_client.openai.gateway import ENDPOINTS, Offer, make_app
from paged_client.openai.limits import FREE_BYTES, Bodies, BodyLimits
from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.protocol import CompletionBody
from paged_client.question import Question

Outputs = dict[str, list[Any]]
HI = [{"role": "user", "content": "Hi"}]


DESCRIBED = {"max_model_len": 512, "adapters": ["french"], "chat_templates": {"default": "…"}, "special_words": ["<s>"]}


def described(**facts: Any) -> Outputs:
    return {"text_output": [json.dumps({**DESCRIBED, **facts})], "output_ids": [], "finish_reason": ["stop"]}


def piece(text: str, finish: str = "None") -> Outputs:
    return {
        "text_output": [text],
        "output_ids": [7],
        "finish_reason": [finish],
        "num_input_tokens": [5],
        "num_cached_tokens": [4],
    }


class Transport:
    """Every call brings the same pieces and exceptions, then nothing more for ever."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.asked: list[Question] = []
        self.num_left = 0
        self.ready = True
        self.description: Any = described()

    def ask(self, question: Question) -> Call:
        if question.tensors.get("task") == "describe":
            return Call(self, [self.description])
        self.asked.append(question)
        return Call(self)

    async def is_ready(self) -> bool:
        return self.ready

    async def close(self) -> None:
        pass

    @property
    def sampling(self) -> dict[str, Any]:
        sampling: dict[str, Any] = json.loads(str(self.asked[-1].tensors["sampling_parameters"]))
        return sampling


class Call:
    def __init__(self, transport: Transport, events: Sequence[Any] | None = None) -> None:
        self._transport = transport
        self._events = list(transport.events if events is None else events)

    async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
        await asyncio.sleep(0)
        if not self._events:
            await asyncio.sleep(60)
        event = self._events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event, event["finish_reason"] != ["None"]

    def cancel(self) -> None:
        self._transport.num_left += 1


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        return [
            event if event == "[DONE]" else json.loads(event)
            for event in self.text.replace("data: ", "").strip().split("\n\n")
        ]


def call(
    transport: Transport,
    path: str,
    body: Any = None,
    *,
    key: str = "",
    bodies: BodyLimits | None = None,
    headers: dict[str, str] | None = None,
    leave: Callable[[Reply], bool] | None = None,
    origins: tuple[str, ...] = (),
    method: str = "",
    metrics: GatewayMetrics | None = None,
    strict: bool = False,
    forms: FormOptions | None = None,
) -> Reply:
    """One request. leave: asked over and over; True closes the connection."""
    client = AsyncPagedClient("nowhere:1", retries=0)
    client._transport = transport
    app = make_app(
        client,
        Offer(("m", "alias"), key, bodies or BodyLimits(), origins, strict=strict, forms=forms or FormOptions()),
        metrics,
    )
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
    }
    reply = Reply()

    async def run() -> None:
        waiting = [raw[start : start + 1000] for start in range(0, max(1, len(raw)), 1000)]

        async def receive() -> dict[str, Any]:
            if waiting:
                chunk = waiting.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}
            while leave is None or not leave(reply):
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.text += message["body"].decode()

        await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(run())
    return reply


def complete(transport: Transport, *, strict: bool = False, **keys: Any) -> Reply:
    return call(transport, "/v1/completions", {"model": "m", "prompt": "x", **keys}, strict=strict)


def chat(transport: Transport, *, strict: bool = False, **keys: Any) -> Reply:
    return call(transport, "/v1/chat/completions", {"model": "m", "messages": HI, **keys}, strict=strict)


WHOLE = Transport(piece("ab", "stop"))


def test_a_json_schema_reaches_the_server_as_structured_outputs() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    transport = Transport(piece("{}", "stop"))
    reply = chat(
        transport,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert reply.json["choices"][0]["message"]["content"] == "{}"
    assert transport.sampling == {
        "generation_defaults": True,
        "structured_outputs": {"json": schema, "disable_any_whitespace": True},
    }
    chat(transport, response_format={"type": "json_object"})
    assert transport.sampling == {
        "generation_defaults": True,
        "structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": True},
    }
    complete(transport, guided_regex="a+", max_tokens=3)
    assert transport.sampling == {"guided_regex": "a+", "max_tokens": 3}


def test_tools_and_messages_reach_the_server() -> None:
    transport = Transport(piece("f()", "stop"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    reply = chat(transport, tools=tools, continue_final_message=True, add_generation_prompt=False, cache_salt="me")
    assert reply.json["choices"][0]["message"] == {"role": "assistant", "content": "f()", "refusal": None}
    question = transport.asked[0]
    assert (json.loads(str(question.tensors["tools"])), json.loads(str(question.tensors["messages"]))) == (tools, HI)
    assert question.tensors["continue_final_message"] is True
    assert question.parameters["cache_salt"] == "me"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_servers_log_and_the_caller_have_the_same_number_of_a_request(stream: bool) -> None:
    transport = Transport(piece("a", "stop"))
    reply = complete(transport, stream=stream)
    assert transport.asked[-1].parameters["id"] == reply.headers["x-request-id"]
    complete(transport, stream=stream, request_id="mine-1")
    assert transport.asked[-1].parameters["id"] == "mine-1"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequestError("top_p: no"), 400), (UnavailableError("full"), 503), (ServerError("broken"), 500)],
    ids=str,
)
def test_an_error_before_the_first_piece_has_a_status(stream: bool, error: PagedError, status: int) -> None:
    reply = complete(Transport(error), stream=stream)
    assert reply.status == status
    assert reply.json["error"]["message"] == str(error)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")


def test_an_error_after_it_is_an_event_of_the_stream() -> None:
    reply = complete(Transport(piece("a"), ServerError("broken")), stream=True)
    assert reply.status == 200
    first, error, done = reply.events
    assert first["choices"][0]["text"] == "a"
    assert error == {"error": {"message": "broken", "type": "server_error", "param": None, "code": None}}
    assert done == "[DONE]"


def test_usage_is_streamed_if_asked_for() -> None:
    transport = Transport(piece("a"), piece("b", "length"))
    *pieces, last, done = complete(
        transport, stream=True, stream_options={"include_usage": True}, prompt=["x", "y"]
    ).events
    assert [one["usage"] for one in pieces] == [None] * 4
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert all("usage" not in event for event in complete(transport, stream=True).events[:-1])
    asked = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last, done = complete(transport, stream=True, stream_options=asked).events
    assert [one["usage"]["completion_tokens"] for one in pieces] == [1, 2]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_caller_who_leaves_before_the_first_piece_cancels_every_prompts_request(stream: bool) -> None:
    transport = Transport()
    call(
        transport,
        "/v1/completions",
        {"model": "m", "prompt": ["x", "y"], "stream": stream},
        leave=lambda _: len(transport.asked) == 2,
    )
    assert transport.num_left == 2


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_caller_who_leaves_a_stream_cancels_every_prompts_request(prompts: int) -> None:
    transport = Transport(piece("a"), piece("b"))
    reply = call(
        transport,
        "/v1/completions",
        {"model": "m", "prompt": ["x"] * prompts, "stream": True},
        leave=lambda reply: reply.text.count('"b"') == prompts,
    )
    assert "[DONE]" not in reply.text
    assert (len(transport.asked), transport.num_left) == (prompts, prompts)


def test_one_prompts_error_cancels_the_others() -> None:
    class OneFails(Transport):
        def ask(self, question: Question) -> Call:
            self.events = (ServerError("broken"),) if self.asked else ()
            return super().ask(question)

    for stream in (False, True):
        transport = OneFails()
        assert complete(transport, prompt=["x", "y"], stream=stream).status == 500
        assert transport.num_left == 2


def test_models_are_those_that_are_offered() -> None:
    listed = call(WHOLE, "/v1/models").json
    assert (listed["object"], [model["id"] for model in listed["data"]]) == (
        "list",
        ["m", "alias", "m:french", "alias:french"],
    )
    assert {model["max_model_len"] for model in listed["data"]} == {512}
    assert [model["parent"] for model in listed["data"]] == [None, None, "m", "alias"]
    silent = Transport()
    silent.description = InvalidRequestError("unexpected inference input 'task' for model 'm'")
    assert [model["id"] for model in call(silent, "/v1/models").json["data"]] == ["m", "alias"], (
        "an older model says nothing"
    )
    assert call(WHOLE, "/v1/models/alias").json["id"] == "alias"
    assert complete(WHOLE, model="alias").json["model"] == "alias"
    for reply in (call(WHOLE, "/v1/models/a/b"), complete(WHOLE, model="other"), chat(WHOLE, model="other")):
        assert (reply.status, reply.json["error"]["code"], reply.json["error"]["param"]) == (
            404,
            "model_not_found",
            "model",
        )


def test_an_adapter_is_named_behind_the_models_name_or_as_lora_name() -> None:
    transport = Transport(piece("x", "stop"))
    for ask in (complete, chat):
        reply = ask(transport, model="alias:french")
        assert (reply.status, reply.json["model"], transport.sampling["lora_name"]) == (200, "alias:french", "french")
        assert (
            ask(transport, model="m", lora_name="german").status == 200 and transport.sampling["lora_name"] == "german"
        )
        assert ask(transport, model="m").status == 200 and "lora_name" not in str(
            transport.asked[-1].tensors.get("sampling_parameters")
        )
        both = ask(transport, model="m:french", lora_name="german")
        assert (both.status, both.json["error"]["param"]) == (400, "lora_name")
        for name in ("x:french", "m:", ":french"):
            assert ask(transport, model=name).status == 404
    assert call(transport, "/v1/models/m:french").json["parent"] == "m"
    assert call(transport, "/v1/models/m:german").status == 404
    unknown = Transport(InvalidRequestError("lora_name: 'french': this server has no such adapter"))
    as_model, as_field = complete(unknown, model="m:french"), complete(unknown, model="m", lora_name="french")
    named, plain = as_model.json["error"], as_field.json["error"]
    assert (as_model.status, named["param"], named["message"]) == (
        404,
        "model",
        "model: 'french': this server has no such adapter",
    )
    assert (as_field.status, plain["param"], plain["message"]) == (
        400,
        "lora_name",
        "lora_name: 'french': this server has no such adapter",
    )


def test_load_balancers_may_ask_for_the_head_of_health_alone() -> None:
    assert call(WHOLE, "/health", method="HEAD").status == 200


def test_health_is_the_servers() -> None:
    transport = Transport({"text_output": [""], "finish_reason": ["stop"]})
    for path in ("/health", "/v1/health", "/ping"):
        transport.ready = True
        assert call(transport, path, key="secret").status == 200
        transport.ready = False
        assert call(transport, path, key="secret").status == 503


@pytest.mark.parametrize(
    ("event", "status"),
    [
        pytest.param(UnavailableError("the model has no engine any more"), 503, id="its engine is lost"),
        pytest.param(ServerError("Stub process is not healthy"), 503, id="its front end is dead"),
        pytest.param(InvalidRequestError("text_input: missing"), 200, id="a model that does not know the question"),
    ],
)
def test_health_is_what_the_model_says_of_itself(event: Exception, status: int) -> None:
    """Triton Server before 26.03 calls a model ready that has no engine any more."""
    transport = Transport(event)
    assert call(transport, "/health", key="secret").status == status
    assert transport.asked[0].parameters["health_check"] is True


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic secret", 401),
        ("Bearer secret2", 401),
        ("Bearer é", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
    ids=str,
)
def test_only_who_has_the_key_may_ask(authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    for path, body in (("/v1/models", None), ("/v1/completions", {"model": "m", "prompt": "x"})):
        reply = call(Transport(piece("a", "stop")), path, body, key="secret", headers=headers)
        assert reply.status == status
        if status == 401:
            assert reply.json["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_over_the_limit_is_refused(declared: bool) -> None:
    body = {"model": "m", "prompt": "x" * 5000}
    headers = {} if declared else {"content-length": ""}
    transport = Transport(piece("a", "stop"))
    assert call(transport, "/v1/completions", body, bodies=BodyLimits(5100), headers=headers).status == 200
    reply = call(transport, "/v1/completions", body, bodies=BodyLimits(5000), headers=headers)
    assert (reply.status, reply.json["error"]["message"]) == (413, "the body is longer than 5000 bytes")
    assert len(transport.asked) == 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"\xff", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        ({"prompt": "x"}, "model", "missing"),
        ({"model": "m"}, "prompt", "missing"),
        (
            {"model": "m", "prompt": "x", "max_token": 1},
            "max_token",
            "unknown parameter: 'max_token'; did you mean 'max_tokens'?",
        ),
        (
            {"model": "m", "prompt": "x", "stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "did you mean 'stream_options.include_usage'",
        ),
        ({"model": "m", "prompt": "x", "request_id": "a b"}, "request_id", "match pattern"),
        ({"model": "m", "prompt": "x", "priority": 1, "priority_level": 2}, "priority", "priority_level"),
        ({"model": "m", "prompt": "x", "temperature": "hot"}, "temperature", "expected a valid number"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "temperature", "finite"),
        ({"model": "m", "prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"model": "m", "prompt": {"a": 1}}, "prompt", "expected a valid string"),
        (
            {"model": "m", "prompt": "x"} | {str(key): 1 for key in range(2000)},
            None,
            "the body: 2002 keys; the most allowed is 1024",
        ),
        (
            {"model": "m", "prompt": "x", "logit_bias": {str(key): 1 for key in range(2000)}},
            "logit_bias",
            "logit_bias: 2000 keys; the most allowed is 1024",
        ),
        (b'{"model": "\\ud800", "prompt": "x"}', "model", "no Unicode text"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_cannot_be_read_is_refused_by_field(body: Any, param: str | None, words: str) -> None:
    reply = call(WHOLE, "/v1/completions", body)
    assert reply.status == (404 if "does not exist" in words else 400)
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert reply.json["error"]["param"] == param
    assert words in reply.json["error"]["message"]


@pytest.mark.parametrize("wrong", [[-1] * 50_000, ["x", 1] * 25_000, [[-1]] * 50_000], ids=["ids", "mixed", "lists"])
def test_a_list_of_wrong_things_is_one_mistake(wrong: list[Any]) -> None:
    """A mistake for each costs a kilobyte, in each of the ways in which the list could have been meant."""
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"model": "m", "prompt": wrong})
    assert caught.value.error_count() < 10


def test_nobody_is_told_where_the_server_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reply = complete(Transport(UnreachableError("no Triton Server can be reached at 10.0.0.7:8001: refused")))
    assert reply.status == 503
    assert reply.json["error"]["message"] == "the server cannot be reached"
    assert "10.0.0.7" in caplog.text


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"]
)
def test_what_any_web_page_could_send_is_not_taken_for_json(kind: str) -> None:
    reply = call(WHOLE, "/v1/completions", {"model": "m", "prompt": "x"}, headers={"content-type": kind})
    assert (reply.status, "Content-Type" in reply.json["error"]["message"]) == (415, True)


def test_other_paths_and_methods_are_refused_in_the_same_shape() -> None:
    assert call(WHOLE, "/v1/images", {}).json["error"]["message"] == "POST /v1/images: Not Found"
    wrong = call(WHOLE, "/v1/completions")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


def test_pages_of_allowed_origins_may_ask() -> None:
    headers = {"origin": "https://a.example"}
    assert (
        call(WHOLE, "/v1/models", headers=headers, origins=("https://a.example",)).headers[
            "access-control-allow-origin"
        ]
        == "https://a.example"
    )
    assert "access-control-allow-origin" not in call(WHOLE, "/v1/models", headers=headers).headers
    for origin, allowed in {
        "http://localhost:3000": True,
        "http://127.0.0.1": True,
        "http://localhost.evil.example": False,
        "http://evil.example/localhost": False,
    }.items():
        reply = call(WHOLE, "/v1/models", headers={"origin": origin}, origins=("localhost",))
        assert ("access-control-allow-origin" in reply.headers) == allowed, origin


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_failure_of_our_own_tells_the_log_no_text(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        reply = complete(Transport(RuntimeError("secret prompt")), prompt="secret prompt", stream=stream)
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    assert "secret" not in caplog.text + reply.text
    assert "RuntimeError at " in caplog.text


# ---- keys of other servers

VLLMS = {
    "kv_transfer_params": None,
    "mm_processor_kwargs": None,
    "request_id": "mine-1",
    "best_of": 1,
    "spaces_between_special_tokens": True,
    "heat": None,
}


def test_null_is_not_given_and_keys_of_vllm_are_taken() -> None:
    transport = Transport(piece("x", "stop"))
    for ask, special in ((complete, True), (chat, False)):
        for strict in (False, True):
            reply = ask(transport, **VLLMS, priority=-3, add_special_tokens=special, strict=strict)
            assert reply.status == 200 and "x-paged-warning" not in reply.headers
            assert reply.json["id"].endswith("-mine-1")
            assert transport.sampling["priority_level"] == -3 and transport.sampling["best_of"] == 1


def test_a_key_without_effect_is_a_warning_or_with_strict_refused() -> None:
    unused = {
        "extra_args": {"a": 1},
        "heat": 1,
        "spaces_between_special_tokens": False,
        "stream_options": {"x": 1},
        "stream": True,
        "é\n": 1,
    }
    reply = chat(WHOLE, **unused, add_special_tokens=True)
    assert reply.status == 200
    assert reply.headers["x-paged-warning"] == (
        "ignored: extra_args, heat, ??, stream_options.x, spaces_between_special_tokens"
    )
    assert complete(WHOLE, models=["m"], top_a=1).headers["x-paged-warning"] == "ignored: models, top_a"
    many = complete(WHOLE, **{f"key_{number}": 1 for number in range(900)}).headers["x-paged-warning"]
    assert many.endswith("key_9 ...") and len(many) < 1000
    refused = chat(WHOLE, heat=1, strict=True)
    assert (refused.status, refused.json["error"]["param"], refused.json["error"]["code"]) == (
        400,
        "heat",
        "unknown_parameter",
    )


def test_unknown_names_do_not_cost_time() -> None:
    started = time.process_time()
    complete(WHOLE, **{"max_" + "x" * 3000 + str(number): 1 for number in range(1000)})
    assert time.process_time() - started < 2


# ---- tokens


def test_tokens_of_a_prompt_or_messages_and_back() -> None:
    transport = Transport(
        {"text_output": [""], "output_ids": [5, 6], "finish_reason": ["stop"], "num_input_tokens": [2]}
    )
    assert call(transport, "/tokenize", {"model": "m", "prompt": "a b"}).json == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [5, 6],
        "token_strs": None,
    }
    assert {**transport.asked[-1].tensors} == {
        "task": "tokenize",
        "stream": False,
        "return_finish_reason": True,
        "text_input": "a b",
    }
    chatted = call(transport, "/tokenize", {"messages": HI, "tools": [], "add_generation_prompt": False})
    assert chatted.json["count"] == 2
    assert json.loads(str(transport.asked[-1].tensors["messages"])) == HI
    assert transport.asked[-1].tensors["add_generation_prompt"] is False and "tools" not in transport.asked[-1].tensors
    back = Transport({"text_output": ["a b"], "output_ids": [], "finish_reason": ["stop"]})
    assert call(back, "/detokenize", {"tokens": [5, 6]}).json == {"prompt": "a b"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"model": "x", "prompt": "x"}, "model"),
        ("/detokenize", {"tokens": []}, "tokens"),
    ):
        assert call(transport, path, body).json["error"]["param"] == param
    refused = call(Transport(InvalidRequestError("input_ids: 999 is not a token")), "/detokenize", {"tokens": [999]})
    assert (refused.status, refused.json["error"]["param"]) == (400, "tokens")


# ---- what a stranger can send


def test_two_lengths_of_a_body_end_the_connection() -> None:
    """Content-Length is there already: a proxy might believe the one, and this process the other."""
    reply = call(WHOLE, "/v1/completions", {"model": "m", "prompt": "x"}, headers={"transfer-encoding": "chunked"})
    assert (reply.status, reply.headers["connection"]) == (400, "close")
    assert "Transfer-Encoding" in reply.json["error"]["message"]


@pytest.mark.parametrize("given", ["clé", "a\nb", "a\x7f", "   "], ids=repr)
def test_a_key_that_no_header_can_carry_is_refused_at_start(given: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        usable_key(given)


def test_a_key_loses_the_white_space_around_it() -> None:
    assert (usable_key(" a key\n"), usable_key("")) == ("a key", "")


def arriving(*sizes: int, end: bool = True) -> Any:
    """`receive` of a body in chunks; after them nothing, for ever, unless `end`."""
    chunks = list(sizes)

    async def receive() -> dict[str, Any]:
        if not chunks:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": b"x" * chunks.pop(0), "more_body": bool(chunks) or not end}

    return receive


def test_bodies_in_flight_have_a_bound_that_small_ones_do_not_meet() -> None:
    async def scenario() -> None:
        bodies = Bodies(BodyLimits(max_body_bytes=2**20, max_bodies_bytes=2**20, seconds=5))
        with bodies.place() as large:
            assert len(await large.read(Headers(), arriving(500_000, 500_000))) == 1_000_000
            assert bodies.bytes_in_flight == 1_000_000 - FREE_BYTES
            with bodies.place() as second, pytest.raises(RefusalError, match="max_bodies_bytes") as refused:
                await second.read(Headers(), arriving(FREE_BYTES, 200_000))
            assert refused.value.status == 503
            with bodies.place() as small:
                assert len(await small.read(Headers(), arriving(FREE_BYTES))) == FREE_BYTES
        assert bodies.bytes_in_flight == 0

    asyncio.run(scenario())


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def scenario() -> None:
        bodies = Bodies(BodyLimits(seconds=0.05))
        with bodies.place() as place, pytest.raises(RefusalError, match="had not arrived after 0.05 s") as refused:
            await place.read(Headers(), arriving(100_000, end=False))
        assert (refused.value.status, bodies.bytes_in_flight) == (408, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_of_many_prompts_only_so_many_are_asked_at_once(stream: bool) -> None:
    class Counting(Transport):
        running = most = 0

        def ask(self, question: Question) -> Call:
            self.running += 1
            self.most = max(self.most, self.running)
            return super().ask(question)

    class Ending(Call):
        async def next(self, seconds: float | None) -> tuple[Outputs, bool]:
            answer = await super().next(seconds)
            self._transport.running -= answer[1]  # type: ignore[attr-defined]
            return answer

    transport = Counting(piece("a"), piece("b", "stop"))
    transport.ask = lambda question: (Counting.ask(transport, question), Ending(transport))[1]  # type: ignore[method-assign]
    reply = complete(transport, prompt=["x"] * 700, stream=stream)
    texts = [""] * 700
    for event in reply.events[:-1] if stream else [reply.json]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["ab"] * 700
    assert 1 < transport.most <= 256


class Connection:
    """As uvicorn's protocol objects look to the table of connections."""

    class Cycle:
        response_complete = False

    def __init__(self, *, busy: bool = False) -> None:
        self.cycle = Connection.Cycle() if busy else None
        self.transport = self
        self.said = b""
        self.ended = ""

    def write(self, said: bytes) -> None:
        self.said += said

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def test_the_longest_silent_connection_makes_room() -> None:
    connections = Connections(ConnectionLimits(3), GatewayMetrics(ENDPOINTS))
    first, working, third, fourth, fifth = (
        Connection(),
        Connection(busy=True),
        Connection(),
        Connection(),
        Connection(busy=True),
    )
    for one in (first, working, third, fourth, fifth):
        connections.add(one)
    assert [one.ended for one in (first, working, third, fourth, fifth)] == ["aborted", "", "aborted", "", ""]
    fourth.cycle = Connection.Cycle()
    late = Connection()
    connections.add(late)
    assert late.ended == "closed"
    head, _, body = late.said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"Content-Length: %d" % len(body) in head
    assert json.loads(body)["error"]["code"] == "overloaded"


def test_a_silent_connection_is_closed_and_a_working_one_is_not() -> None:
    async def scenario() -> tuple[str, str]:
        connections = Connections(ConnectionLimits(9, seconds=0.04), GatewayMetrics(ENDPOINTS))
        silent, working = Connection(), Connection(busy=True)
        for one in (silent, working):
            connections.add(one)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(connections.sweep(), 0.2)
        return silent.ended, working.ended

    assert asyncio.run(scenario()) == ("aborted", "")


def test_a_failed_accept_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        say_failed_accepts(loop)
        message = "socket.accept() out of system resource"
        loop.call_exception_handler({"message": message, "exception": OSError(24, "Too many open files")})
        loop.call_exception_handler({"message": "something else"})

    asyncio.run(scenario())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "a connection could not be accepted: Too many open files; trying again in a second",
        "something else",
    ]


# ---- about the gateway


def test_metrics_count_what_was_asked_and_answered() -> None:
    metrics = GatewayMetrics(ENDPOINTS)
    for stream in (False, True):
        call(WHOLE, "/v1/completions", {"model": "m", "prompt": "x", "stream": stream}, metrics=metrics)
    call(WHOLE, "/v1/completions", {"model": "m"}, metrics=metrics)
    call(WHOLE, "/nonesuch/1234", metrics=metrics)
    page = call(WHOLE, "/metrics", metrics=metrics)
    assert page.headers["content-type"].startswith("text/plain")
    values = {
        sample.name + str(sorted(sample.labels.values())): sample.value
        for family in parse(page.text)
        for sample in family.samples
    }
    assert values["paged_gateway_requests_total['/v1/completions', '200']"] == 2
    assert values["paged_gateway_requests_total['/v1/completions', '400']"] == 1
    assert values["paged_gateway_requests_total['404', 'other']"] == 1
    assert values["paged_gateway_tokens_total['prompt']"] == 10 and values["paged_gateway_tokens_total['answer']"] == 2
    assert values["paged_gateway_request_seconds_count['/v1/completions']"] == 3
    assert values["paged_gateway_requests_in_flight[]"] == 1, "the one that reads this"
    assert "process_open_fds[]" in values
    assert call(WHOLE, "/metrics", key="secret").status == 401


def test_the_gateway_says_which_version_it_is() -> None:
    assert re.match(r"\d+\.\d+|unknown", call(WHOLE, "/version").json["version"])


def test_the_description_of_the_api_has_no_name_twice() -> None:
    app = make_app(AsyncPagedClient("nowhere:1"), Offer(("m",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "/v1/chat/completions" in app.openapi()["paths"]
