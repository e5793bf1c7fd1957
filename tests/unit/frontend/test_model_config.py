"""Triton Server's own part of config.pbtxt."""

from __future__ import annotations

from typing import Any

import pytest

from paged_backend.errors import EngineError
from paged_backend.frontend.model_config import check_tensors, may_stream


def _config(inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    return {"input": [{"name": name} for name in inputs], "output": [{"name": name} for name in outputs]}


@pytest.mark.parametrize("prompt", ["text_input", "input_ids", "messages"])
def test_one_kind_of_prompt_is_enough(prompt: str) -> None:
    check_tensors(_config([prompt, "stream"], ["text_output"]))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        pytest.param(
            {}, "no input of text_input, input_ids, messages and no output text_output", id="parameters alone"
        ),
        pytest.param(
            _config(["stream"], ["text_output"]), "no input of text_input, input_ids, messages, so", id="no prompt"
        ),
        pytest.param(_config(["text_input"], ["output_ids"]), "declares no output text_output, so", id="no text"),
    ],
)
def test_a_config_whose_every_request_would_be_refused_is_refused_at_load(config: dict[str, Any], missing: str) -> None:
    with pytest.raises(EngineError, match=f"{missing}.*replaces config.pbtxt"):
        check_tensors(config)


@pytest.mark.parametrize(("policy", "streams"), [({"decoupled": True}, True), ({"decoupled": False}, False)])
def test_the_transaction_policy_says_whether_answers_may_be_streamed(policy: dict[str, bool], streams: bool) -> None:
    assert may_stream({"model_transaction_policy": policy}) is streams
