"""The gateway's application, called as an ASGI server would, over a client whose transport is a script."""

from __future__ import annotations

import json
import re
import time
import warnings

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families as parse

from paged_client import (
    AsyncPagedClient,
    InvalidRequestError,
    PagedError,
    ServerError,
    UnavailableError,
)
from paged_client.openai.gateway import ENDPOINTS, Offer, make_app
from paged_client.openai.metrics import GatewayMetrics
from paged_client.question import Question
from tests.unit.client.gateway_calls import (
    HI,
    WHOLE,
    Call,
    Transport,
    call,
    chat,
    complete,
    piece,
)


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
