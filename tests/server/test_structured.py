"""Answers of a form, through a real tritonserver: whatever is finished validates, over gRPC and HTTP, streamed and
whole, and what cannot be is refused.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jsonschema
import pytest

from paged_backend.server.launch import Server, ServerSettings
from tests.server.calls import Answer, engine_pid, run_all, wait_for_metrics
from tests.server.served import served

pytestmark = pytest.mark.server

PROMPT = "Once upon a time there was a clever baker called Mira. One day she"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "trade": {"enum": ["baker", "miller", "none"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,6}$"}, "maxItems": 3},
    },
    "required": ["name", "age", "trade", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'perhaps "so"\n', "vielleicht später"]
FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"guided_json": PERSON}, PERSON),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, PERSON),
    (
        {
            "structured_outputs": {
                "json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
                "disable_any_whitespace": True,
            }
        },
        {"type": "array"},
    ),
    ({"guided_regex": "(Mira|Tom) has [0-9]{1,3} loaves"}, re.compile("(Mira|Tom) has [0-9]{1,3} loaves")),
    ({"guided_choice": CHOICES}, re.compile("|".join(map(re.escape, CHOICES)))),
    ({"guided_grammar": 'root ::= "(" [a-c]{2} ("," root)? ")"'}, re.compile(r"(\([abc]{2},)*\([abc]{2}\)+")),
]
# the grammar's answers, which a model may nest for ever, up to any token
ENDLESS = re.compile(r"(\([abc]{2},)*(\([abc]{0,2}\)*)?")
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 30, "min_p": 0.01, "seed": 6},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logprobs": 2},
    {"min_tokens": 4, "logit_bias": {"17": 2.0}, "stop": ["§§"]},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {
        "num_pages": 400,
        "max_num_sequences": 24,
        "dtype": "float32",
        "max_model_len": 384,
        "max_engine_restarts": 100,
        "speculation": "off",  # with it: tests/e2e/test_speculation_guided.py, tests/server/test_speculation.py
    }
    with served(ServerSettings(instances=2, options=options)) as running:
        yield running


def check(text: str, form: Any) -> None:
    if isinstance(form, re.Pattern):
        assert form.fullmatch(text), (text, form)
    else:
        jsonschema.validate(json.loads(text), form)


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    """Over HTTP. sampling_parameters is sent as text, as curl does."""
    fields["sampling_parameters"] = json.dumps(fields["sampling_parameters"])
    body = json.dumps({"text_input": PROMPT, "max_tokens": 200, "exclude_input_in_output": True, **fields}).encode()
    with urlopen(Request(f"{server.addresses.http_url}/v2/models/paged_llm/generate", body), timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def mixture(one_in: int) -> list[tuple[dict[str, Any], Any]]:
    """Requests and their forms: each form with one in so many kinds of sampling, in turn; and some that follow none."""
    pairs = [
        (form | sampling, expected)
        for place, (form, expected) in enumerate(FORMS)
        for other, sampling in enumerate(SAMPLINGS)
        if (place + other) % one_in == 0
    ] + [({"ignore_eos": True}, None)] * 6
    return [
        ({"text_input": f"{number}. {PROMPT}", "max_tokens": 200, "sampling_parameters": sampling}, form)
        for number, (sampling, form) in enumerate(pairs)
    ]


@pytest.mark.parametrize("one_in", [pytest.param(1, marks=pytest.mark.long), 2])
def test_every_finished_answer_is_of_its_form_with_every_kind_of_sampling(server: Server, one_in: int) -> None:
    pairs = mixture(one_in)
    answers = run_all(server.addresses.grpc_url, [request for request, _ in pairs])
    num_finished = num_endless = 0
    for answer, (request, form) in zip(answers, pairs, strict=True):
        assert answer.error is None and answer.num_finals == 1, (answer.message, request)
        if form is not None and answer.finish_reasons[-1] == "stop":
            num_finished += 1
            check("".join(answer.text), form)
        elif "guided_grammar" in request["sampling_parameters"]:
            num_endless += 1
            check("".join(answer.text), ENDLESS)
    assert num_finished > 0.9 * (len(pairs) - 6 - num_endless)


def test_over_http_each_of_n_sequences_is_of_the_form(server: Server) -> None:
    answer = generate(
        server,
        sampling_parameters={"n": 4, "seed": 9, "temperature": 1.2, "guided_json": PERSON},
        return_finish_reason=True,
    )
    assert answer["finish_reason"] == ["stop"] * 4
    for text in answer["text_output"]:
        check(text, PERSON)
    assert len(set(answer["text_output"])) > 1
    assert (
        generate(server, sampling_parameters={"structured_outputs": {"choice": ["yes"]}, "ignore_eos": True})[
            "text_output"
        ]
        == "yes"
    )


def test_a_stop_string_and_max_tokens_end_an_answer_before_its_form_is_complete(server: Server) -> None:
    stopped = generate(
        server, sampling_parameters={"guided_json": PERSON, "stop": ['"age"'], "seed": 1}, return_finish_reason=True
    )
    assert (
        stopped["finish_reason"] == "stop" and "name" in stopped["text_output"] and "age" not in stopped["text_output"]
    )
    cut = generate(
        server, sampling_parameters={"guided_json": PERSON, "seed": 1}, max_tokens=3, return_finish_reason=True
    )
    assert cut["finish_reason"] == "length" and cut["text_output"].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"guided_json": {"type": "text"}}, 'guided_json: Unsupported type "text"'),
        ({"guided_regex": "(a"}, "guided_regex: Regex parsing error"),
        ({"guided_json": PERSON, "guided_regex": "a"}, "guided_json and guided_regex: an answer has one form"),
        ({"guided_regex": "((((a|b){0,99}){0,99}){0,99}){0,99}"}, "guided_regex: it is too slow to follow: "),
        pytest.param(
            {"guided_regex": "7{80}((([ a-z]{0,250}){0,250}){0,250}){0,250}", "min_tokens": 190},
            "guided_regex: it is too slow to follow: ",
            marks=pytest.mark.long,  # in CI without a server: tests/unit/grammar/test_workers.py
        ),
        ({"guided_json": "x" * 200_000}, "guided_json: "),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs: "),
    ],
    ids=["schema", "regex", "two forms", "bomb", "late bomb", "long", "unknown"],
)
def test_what_cannot_be_followed_is_an_invalid_argument_with_the_reason_while_others_go_on(
    server: Server, sampling: dict[str, Any], message: str
) -> None:
    requests = [{"text_input": PROMPT, "sampling_parameters": sampling, "parameters": {"return_error_code": True}}]
    refused, free = run_all(server.addresses.grpc_url, [*requests, {"text_input": PROMPT, "max_tokens": 20}])
    assert refused.message.startswith(f"INVALID_ARGUMENT: {message}"), refused.message
    assert free.error is None and len(free.token_ids) == 20
    if sampling.get("guided_regex") == "(a":
        with pytest.raises(HTTPError) as raised:
            generate(server, sampling_parameters=sampling)
        assert raised.value.code == 400 and message in raised.value.read().decode()


# in CI one dies under other answers: test_engine_death.py; and a follower: tests/unit/grammar/test_workers.py
@pytest.mark.long
def test_an_engine_that_dies_changes_no_answer(server: Server) -> None:
    """Front ends resubmit what was answered; guides are led through it."""
    requests = [
        request | {"sampling_parameters": {"seed": 3, **request["sampling_parameters"]}}
        for request, _ in mixture(one_in=2)
    ]
    expected = run_all(server.addresses.grpc_url, requests)
    before = engine_pid(server.shm_prefix)
    assert before is not None
    answers: list[Answer] = []
    running = threading.Thread(target=lambda: answers.extend(run_all(server.addresses.grpc_url, requests)))
    running.start()
    assert wait_for_metrics(server.addresses.metrics_url, lambda values: values['paged_requests{state="running"}'] > 4)
    os.kill(before, signal.SIGKILL)
    running.join()
    assert engine_pid(server.shm_prefix) != before
    for lived, died in zip(expected, answers, strict=True):
        assert died.error is None, died.message
        assert died.token_ids == lived.token_ids
