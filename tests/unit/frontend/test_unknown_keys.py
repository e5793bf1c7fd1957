"""Names that nobody here knows: near-misses are refused with what was meant, what servers and other clients add is left
out.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest

from paged_backend.errors import RequestError
from paged_backend.frontend import unknown_keys
from paged_backend.frontend.request_reader import read_request
from paged_backend.request import SamplingParams
from tests.log_records import lines_logged_by


def read(parameters: dict[str, Any] | None = None, sampling: dict[str, Any] | None = None) -> SamplingParams:
    tensors = {"text_input": np.array([b"x"], np.object_)}
    if sampling is not None:
        tensors["sampling_parameters"] = np.array([json.dumps(sampling).encode()], np.object_)
    return read_request(tensors, json.dumps(parameters or {}), 0.0).sampling


@pytest.mark.parametrize(
    "name",
    [
        *(
            "id",
            "user-agent",
            "accept-encoding",
            "content-type",
            "authorization",
            "traceparent",
            "x-request-id",
            "x-forwarded-for",
            "x-seed",
            "x-top-k",
        ),
        *("x-stream", "request-id", "api-key", "cookie", "stream_options", "model", "num_beams"),
    ],
)
def test_what_servers_and_other_clients_add_changes_nothing(name: str) -> None:
    assert read({name: "whatever", "max_tokens": 5}) == SamplingParams(max_tokens=5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_token", "max_tokens"), ("max-tokens", "max_tokens"), ("maxTokens", "max_tokens"),
     ("max_new_tokens", "max_tokens"), ("temprature", "temperature"), ("topk", "top_k"), ("stops", "stop"),
     ("exclude_input_in_ouput", "exclude_input_in_output")],
)  # fmt: skip
def test_a_near_miss_is_refused_with_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"unknown request parameter '{name}': did you mean '{meant}'?"):
        read({name: 5})


def test_a_sampling_key_that_nobody_knows_is_refused_without_a_list_of_all() -> None:
    with pytest.raises(RequestError, match=r"^unknown sampling parameter 'max_token': did you mean 'max_tokens'\?$"):
        read(sampling={"max_token": 5})
    with pytest.raises(
        RequestError, match="^unknown sampling parameter 'foo'; the names are those of vLLM's"
    ) as caught:
        read(sampling={"foo": 5})
    assert len(str(caught.value)) < 120


def test_null_is_not_given_whatever_the_name() -> None:
    assert read(sampling={"kv_transfer_params": None, "foo": None, "max_token": None, "n": None}) == SamplingParams()


def test_vllms_own_keys_are_ignored_with_one_warning_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown_keys._warned.cache_clear()
    monkeypatch.setattr(logging.getLogger("paged"), "propagate", True)
    keys = {
        "request_id": "r",
        "spaces_between_special_tokens": True,
        "extra_args": {"a": 1},
        "output_kind": 0,
        "_real_n": 1,
        "max_tokens": 3,
    }
    for _ in range(2):
        assert read(sampling=keys) == SamplingParams(max_tokens=3)
    assert lines_logged_by("unknown_keys", caplog) == [
        f"sampling parameter '{name}' means nothing to this model and is ignored"
        for name in keys
        if name != "max_tokens"
    ]


def test_warnings_are_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown_keys._warned.cache_clear()
    monkeypatch.setattr(logging.getLogger("paged"), "propagate", True)
    for number in range(200):
        read({f"header-{number}-{'x' * 100}\n": "v"})
    lines = lines_logged_by("unknown_keys", caplog)
    assert len(lines) == 64
    assert all(len(line) < 160 and "\n" not in line for line in lines)
    unknown_keys._warned.cache_clear()


def test_vllms_priority_is_the_priority_level() -> None:
    assert read(sampling={"priority": -3}).priority_level == -3
    assert read(sampling={"priority": 2, "priority_level": 2}).priority_level == 2
    with pytest.raises(RequestError, match="priority: not together with another priority_level"):
        read(sampling={"priority": 2, "priority_level": 3})


def test_a_request_brings_no_code() -> None:
    assert read(sampling={"logits_processors": []}) == SamplingParams()
    with pytest.raises(RequestError, match="logits_processors: not supported"):
        read(sampling={"logits_processors": ["module.function"]})
