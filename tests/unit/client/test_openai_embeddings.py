"""`/v1/embeddings`, `/v1/score`, `/v1/rerank` of the gateway's application: what the server is asked, and what the
caller hears.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from paged_client import InvalidRequestError
from paged_client.openai.ranking_api import checked_scoring
from paged_client.question import Question
from tests.unit.client.gateway_calls import Call, Outputs, Reply, Transport, call

YES, NO = 11, 12
VECTORS = {"lamp": (1.0, 0.0), "lantern": (0.8, 0.6), "fox": (0.0, 1.0)}


class Model(Transport):
    """Knows some texts' embeddings and the odds of some documents."""

    def __init__(self, yes: int = YES, failure: Exception | None = None) -> None:
        super().__init__()
        self._yes = yes
        self._failure = failure

    def ask(self, question: Question) -> Call:
        tensors = question.tensors
        if tensors.get("task") == "tokenize":
            ids = [self._yes] * (2 if self._yes < 0 else 1) if tensors["text_input"] == "yes" else [NO]
            return Call(self, [{"text_output": [""], "output_ids": ids, "finish_reason": ["stop"]}])
        if tensors.get("task") == "describe":
            return super().ask(question)
        self.asked.append(question)
        if self._failure is not None:
            return Call(self, [self._failure])
        return Call(self, [_embedded(tensors) if tensors.get("task") == "embed" else _judged(str(tensors["messages"]))])


def _embedded(tensors: Any) -> Outputs:
    vector = VECTORS.get(tensors.get("text_input"), (0.6, -0.8))
    return {
        "text_output": [""],
        "embedding": list(vector),
        "output_ids": [],
        "finish_reason": ["stop"],
        "num_input_tokens": [3],
        "num_cached_tokens": [0],
    }


def _judged(messages: str) -> Outputs:
    """Two beams: the likelier first. Documents with a lamp are likely to be an answer."""
    order = [YES, NO] if "<Document>: a lamp" in messages else [NO, YES]
    entries = [
        json.dumps([{str(token_id): {"logprob": logprob, "rank": None, "decoded_token": "x"}}])
        for token_id, logprob in zip(order, (-0.5, -2.5), strict=True)
    ]
    return {
        "text_output": ["x", "x"],
        "sequence_index": [0, 1],
        "output_ids": order,
        "num_output_tokens": [1, 1],
        "logprobs": entries,
        "finish_reason": ["length", "length"],
        "num_input_tokens": [40],
        "num_cached_tokens": [32],
    }


def sampling_of(question: Question) -> dict[str, Any]:
    sampling: dict[str, Any] = json.loads(str(question.tensors.get("sampling_parameters", "{}")))
    return sampling


def ok(reply: Reply) -> Any:
    assert reply.status == 200, reply.text
    return reply.json


def test_embeddings_come_back_in_order_and_are_counted() -> None:
    model = Model()
    said = ok(
        call(
            model,
            "/v1/embeddings",
            {"model": "m", "input": ["lamp", "fox"], "dimensions": 2, "user": "me", "truncate_prompt_tokens": -1},
        )
    )
    assert [entry["embedding"] for entry in said["data"]] == [[1.0, 0.0], [0.0, 1.0]]
    assert [(entry["object"], entry["index"]) for entry in said["data"]] == [("embedding", 0), ("embedding", 1)]
    assert (said["object"], said["model"], said["usage"]) == ("list", "m", {"prompt_tokens": 6, "total_tokens": 6})
    for question in model.asked:
        assert question.tensors["task"] == "embed" and sampling_of(question) == {
            "dimensions": 2,
            "truncate_prompt_tokens": -1,
        }
        assert question.parameters["id"]


@pytest.mark.parametrize(
    ("given", "asked"),
    [("lamp", ["lamp"]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
    ids=["text", "ids", "lists of ids"],
)
def test_an_input_is_text_or_token_ids_or_a_list_of_either(given: Any, asked: list[Any]) -> None:
    model = Model()
    said = ok(call(model, "/v1/embeddings", {"model": "m", "input": given, "encoding_format": "base64"}))
    assert [question.tensors.get("text_input") or question.tensors["input_ids"] for question in model.asked] == asked
    for entry in said["data"]:
        assert np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").shape == (2,)


def test_an_adapter_and_the_servers_own_keys_reach_the_server() -> None:
    model = Model()
    ok(
        call(
            model,
            "/v1/embeddings",
            {
                "model": "m:french",
                "input": "lamp",
                "pooling": "mean",
                "normalize": False,
                "priority": 3,
                "cache_salt": "s",
            },
        )
    )
    assert sampling_of(model.asked[0]) == {
        "pooling": "mean",
        "normalize": False,
        "priority_level": 3,
        "lora_name": "french",
    }
    assert model.asked[0].parameters["cache_salt"] == "s"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [1, "a"]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "model": "m:x", "lora_name": "y"}, "lora_name"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, "model"),
        ("/v1/embeddings", {"input": "a", "dimension": 3}, "dimension"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "instruction": "i"}, "instruction"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "scoring": "yes_no", "pooling": "mean"}, "pooling"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "scoring": "magic"}, "scoring"),
    ],
)
def test_what_is_wrong_is_named(path: str, body: dict[str, Any], param: str) -> None:
    reply = call(Model(), path, {"model": "m", **body})
    assert reply.status == (404 if param == "model" else 400) and reply.json["error"]["param"] == param, reply.text


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("/v1/embeddings", {"input": ""}, "text_input: the prompt is empty", "input"),
        ("/v1/embeddings", {"input": [9]}, "input_ids: 9 is not a token of this model", "input"),
        (
            "/v1/embeddings",
            {"input": "a", "dimensions": 99},
            "dimensions: 99 is more than this model's embeddings have (64)",
            "dimensions",
        ),
        ("/v1/score", {"text_1": "a", "text_2": ""}, "text_input: the prompt is empty", "text_2"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b"]},
            "the prompt has 600 tokens; the longest this model takes is 511",
            "documents",
        ),
    ],
)
def test_what_the_server_refuses_is_named_as_in_the_body(
    path: str, body: dict[str, Any], message: str, param: str
) -> None:
    error = call(Model(failure=InvalidRequestError(message)), path, {"model": "m", **body}).json["error"]
    assert error["param"] == param and "text_input" not in error["message"]


def test_scores_are_cosines_of_one_text_with_several_or_of_pairs() -> None:
    model = Model()
    said = ok(call(model, "/v1/score", {"model": "m", "text_1": "lamp", "text_2": ["lantern", "fox", "lamp"]}))
    assert [entry["score"] for entry in said["data"]] == pytest.approx([0.8, 0.0, 1.0])
    assert sorted(question.tensors["text_input"] for question in model.asked) == ["fox", "lamp", "lantern"], (
        "each text is embedded once"
    )
    pairs = ok(call(Model(), "/score", {"model": "m", "text_1": ["lamp", "fox"], "text_2": ["fox", "fox"]}))
    assert [(entry["index"], entry["score"]) for entry in pairs["data"]] == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_ranked_by_their_cosine(path: str) -> None:
    said = ok(
        call(
            Model(),
            path,
            {"model": "m", "query": "lamp", "documents": ["fox", {"text": "lantern"}, "lamp"], "top_n": 2},
        )
    )
    assert [(result["index"], result["document"]["text"]) for result in said["results"]] == [
        (2, "lamp"),
        (1, "lantern"),
    ]
    assert said["results"][1]["relevance_score"] == pytest.approx(0.8)
    bare = ok(call(Model(), path, {"model": "m", "query": "lamp", "documents": ["fox"], "return_documents": False}))
    assert bare["results"] == [{"index": 0, "relevance_score": 0.0}] and bare["usage"]["total_tokens"] == 6


def test_the_model_is_asked_yes_or_no_where_that_is_wanted() -> None:
    model = Model()
    said = ok(
        call(
            model,
            "/v1/rerank",
            {
                "model": "m",
                "query": "light?",
                "documents": ["a fox", "a lamp"],
                "scoring": "yes_no",
                "instruction": "find",
            },
        )
    )
    odds = 1 / (1 + math.exp(-2))
    assert [(result["index"], result["relevance_score"]) for result in said["results"]] == [
        (1, pytest.approx(odds)),
        (0, pytest.approx(1 - odds)),
    ]
    sampling = sampling_of(model.asked[0])
    assert (sampling["allowed_token_ids"], sampling["beam_width"], sampling["max_tokens"], sampling["logprobs"]) == (
        [YES, NO],
        2,
        1,
        0,
    )
    system, user = json.loads(str(model.asked[0].tensors["messages"]))
    assert system["role"] == "system" and user["content"] == "<Instruct>: find\n<Query>: light?\n<Document>: a fox"
    assert sampling["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_tokenizer_without_yes_is_told_so() -> None:
    error = call(Model(yes=-1), "/v1/score", {"model": "m", "text_1": "a", "text_2": "b", "scoring": "yes_no"}).json[
        "error"
    ]
    assert error["param"] == "scoring" and "use cosine" in error["message"]
    assert checked_scoring("yes_no") == "yes_no"
    with pytest.raises(ValueError, match="--scoring magic: expected one of cosine, yes_no"):
        checked_scoring("magic")
