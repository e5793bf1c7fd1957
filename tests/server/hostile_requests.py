"""Requests that must be refused, and what the refusal must name."""

from __future__ import annotations

import json
from typing import Any

_PAST_VOCABULARY = 1_000_000
# of bytes; not to be asked many times a second
HEAVY = ("50 MB of text", "100,000 stop words", "100,000 stop words in a tensor")


def _sampling(**keys: object) -> dict[str, Any]:
    return {"text_input": "a", "sampling_parameters": json.dumps(keys)}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"text_input": ""}, "text_input"),
    "no prompt": ({}, "text_input"),
    "two prompts": ({"text_input": "a", "input_ids": [1]}, "input_ids"),
    "prompt longer than the model": ({"input_ids": [5] * 512}, "512"),
    "prompt far longer than the pool": ({"input_ids": [5] * 5000}, "5000"),
    "50 MB of text": ({"text_input": "x" * 50_000_000}, "max_prompt_bytes"),
    "invalid UTF-8": ({"text_input": b"\xff\xfe\xfa"}, "UTF-8"),
    "negative temperature": (_sampling(temperature=-1), "temperature"),
    "NaN in JSON": ({"text_input": "a", "sampling_parameters": '{"temperature": NaN}'}, "sampling_parameters"),
    "NaN as a string": (_sampling(temperature="nan"), "temperature"),
    "NaN in a tensor": ({"text_input": "a", "temperature": float("nan")}, "temperature"),
    "top_p above one": (_sampling(top_p=1.5), "top_p"),
    "negative top_k": (_sampling(top_k=-2), "top_k"),
    "a list for a number": (_sampling(temperature=[1]), "temperature"),
    "text for a number": (_sampling(max_tokens="many"), "max_tokens"),
    "JSON 10,000 levels deep": (
        {"text_input": "a", "sampling_parameters": "[" * 10_000 + "]" * 10_000},
        "sampling_parameters",
    ),
    "an object 10,000 levels deep": (
        {"text_input": "a", "sampling_parameters": '{"stop":' * 10_000 + "1" + "}" * 10_000},
        "sampling_parameters",
    ),
    "JSON that is no object": ({"text_input": "a", "sampling_parameters": "[1]"}, "sampling_parameters"),
    "no JSON": ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters"),
    "an unknown key": (_sampling(temprature=1), "temprature"),
    "max_tokens 0": (_sampling(max_tokens=0), "max_tokens"),
    "max_tokens 2^31": (_sampling(max_tokens=2**31), "max_tokens"),
    "max_tokens above the model": (_sampling(max_tokens=513), "512"),
    "100,000 stop words": (_sampling(stop=["x"] * 100_000), "stop"),
    "100,000 stop words in a tensor": ({"text_input": "a", "stop_words": ["x"] * 100_000}, "stop"),
    "an empty stop word": (_sampling(stop=[""]), "stop"),
    "an id past the vocabulary": ({"input_ids": [5, _PAST_VOCABULARY]}, str(_PAST_VOCABULARY)),
    "a negative id": ({"input_ids": [-1]}, "-1"),
    "streaming with the prompt in front": (
        {"text_input": "a", "exclude_input_in_output": False},
        "exclude_input_in_output",
    ),
    "an unknown parameter": ({"text_input": "a", "parameters": {"temprature": 1}}, "temprature"),
    "n of two, greedy": (_sampling(n=2, temperature=0), "n"),
    "n of too many": (_sampling(n=65), "n"),
}
