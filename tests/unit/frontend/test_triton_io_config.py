"""config.pbtxt is the only file an operator edits: it must show every option as it is, and every tensor that is read or
sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paged_backend.config import TUNABLES, EngineConfig, repository_folder
from paged_backend.request import Outputs

PATH = repository_folder() / "paged_llm" / "config.pbtxt"


@pytest.fixture(scope="module")
def shipped() -> Any:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(PATH.read_text(), model_config.ModelConfig())


def test_parameters_are_the_engines_options_with_their_defaults(shipped: Any) -> None:
    shown = {name: value.string_value for name, value in shipped.parameters.items()}
    assert list(TUNABLES) == [
        line.split('"')[1] for line in PATH.read_text().splitlines() if line.startswith("parameters")
    ]
    assert EngineConfig.parse(shown) == EngineConfig()
    for name, field in TUNABLES.items():
        assert shown[name] == (
            ""
            if field.default is None
            else str(field.default).lower()
            if isinstance(field.default, bool)
            else str(field.default)
        )


def test_each_parameters_comment_is_its_description() -> None:
    comments: list[str] = []
    described = {}
    for line in PATH.read_text().splitlines():
        if line.startswith("#"):
            comments.append(line.removeprefix("# "))
        else:
            if line.startswith("parameters"):
                described[line.split('"')[1]] = " ".join(comments)
            comments = []
    assert described == {name: field.description for name, field in TUNABLES.items()}


def test_every_output_switch_has_its_tensor(shipped: Any) -> None:
    inputs = {tensor.name: tensor for tensor in shipped.input}
    outputs = {tensor.name for tensor in shipped.output}
    # a request parameter only: it adds a word to an error's text, no tensor
    switched = set(Outputs.__struct_fields__) - {"error_code"}
    assert outputs == {"text_output", "embedding", *switched}  # the last with task embed alone
    assert {name.removeprefix("return_") for name in inputs if name.startswith("return_")} == switched
    assert all(tensor.optional for tensor in shipped.input)


def test_the_tensors_are_a_superset_of_nvidias_vllm_backend(shipped: Any) -> None:
    kinds = {tensor.name: tensor.data_type for tensor in [*shipped.input, *shipped.output]}
    string, boolean = 13, 1  # TYPE_STRING, TYPE_BOOL
    names = ("text_input", "sampling_parameters", "text_output", "finish_reason", "logprobs", "embedding_request")
    assert {kinds[name] for name in names} == {string}
    assert kinds["stream"] == kinds["exclude_input_in_output"] == kinds["return_num_output_tokens"] == boolean


def test_the_model_is_decoupled_and_batches_by_itself(shipped: Any) -> None:
    assert shipped.backend == "python"
    assert shipped.model_transaction_policy.decoupled
    assert shipped.max_batch_size == 0
    assert shipped.instance_group[0].count == 4


def test_model_py_is_short_and_without_logic() -> None:
    text = (Path(PATH).parent / "1" / "model.py").read_text()
    assert len(text.splitlines()) <= 60
    assert "TritonPythonModel" in text
