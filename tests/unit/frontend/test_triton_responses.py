"""Deltas as responses of Triton Server: codes, tensors, parameters."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.embeddings import embedding_delta
from paged_backend.frontend.prompt_logprobs import PromptTable
from paged_backend.frontend.response_tensors import ResponseTensors
from paged_backend.messages import PromptEmbedding
from paged_backend.request import Outputs, Request, SamplingParams
from tests.stub_library import FakeTensor, triton_io_with_it


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    with triton_io_with_it(monkeypatch) as module:
        yield module


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.INVALID, "INVALID_ARG"),
        (ErrorKind.OVERLOADED, "UNAVAILABLE"),
        (ErrorKind.CANCELLED, "CANCELLED"),
        (ErrorKind.INTERNAL, "INTERNAL"),
    ],
)
def test_each_kind_of_error_has_its_code(triton_io: types.ModuleType, kind: ErrorKind, code: str) -> None:
    response = triton_io.response_of([Delta(error=RequestError("why", kind))], Outputs(), spelled, new_tensors())
    assert (response.error.message, response.error.code, response.tensors) == ("why", code, {})


def test_every_output_asked_for_is_sent_and_no_other(triton_io: types.ModuleType) -> None:
    delta = Delta(
        text="é",
        token_ids=(5, 6),
        logprobs=({5: (-1.0, 9), 7: (-0.5, 1), 8: (-0.75, 2)}, {6: (-0.25, None)}),
        cumulative_logprob=-1.25,
        num_input_tokens=3,
        num_cached_tokens=2,
        finish_reason="stop",
    )
    response = triton_io.response_of([delta], Outputs(), spelled, new_tensors())
    assert {name: array.tolist() for name, array in response.tensors.items()} == {"text_output": ["é".encode()]}
    everything = Outputs(**dict.fromkeys(Outputs.__struct_fields__, True))
    arrays = triton_io.response_of([delta], everything, spelled, new_tensors()).tensors
    logprobs = json.loads(arrays.pop("logprobs")[0])
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "text_output": ["é".encode()],
        "finish_reason": [b"stop"],
        "cumulative_logprob": [-1.25],
        "num_input_tokens": [3],
        "num_output_tokens": [2],
        "output_ids": [5, 6],
        "num_cached_tokens": [2],
        "sequence_index": [0],
    }
    assert {name: str(array.dtype) for name, array in arrays.items() if array.dtype != object} == {
        "cumulative_logprob": "float32",
        "num_input_tokens": "uint32",
        "num_output_tokens": "uint32",
        "output_ids": "int32",
        "num_cached_tokens": "uint32",
        "sequence_index": "int32",
    }
    assert logprobs == [
        {
            "5": {"logprob": -1.0, "rank": 9, "decoded_token": " <5>"},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": " <7>"},
            "8": {"logprob": -0.75, "rank": 2, "decoded_token": "\ufffd", "bytes": [0xF0, 0x9F]},
        },
        {"6": {"logprob": -0.25, "rank": None, "decoded_token": " <6>"}},
    ]


def new_tensors() -> ResponseTensors:
    return ResponseTensors(FakeTensor)


def spelled(token_id: int) -> bytes:
    return b"\xf0\x9f" if token_id == 8 else f" <{token_id}>".encode()


def test_no_more_than_a_tokens_logprobs_are_written_at_once(
    triton_io: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes JSON without a pause for other threads, and a prompt's may be tens of megabytes."""
    floats, ints = np.full((99, 3), -1.5, np.float32), np.arange(1, 298, dtype=np.int32).reshape(99, 3)
    table = PromptTable(np.arange(100, dtype=np.int32), floats[:, 0], ints[:, 0], ints, floats)
    delta = Delta(prompt=table, logprobs=({5: (-1.0, 1)},) * 50)
    written: list[int] = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value: (written.append(len(value or ())), dumps(value))[1])
    arrays = triton_io.response_of(
        [delta], Outputs(prompt_logprobs=True, logprobs=True), spelled, new_tensors()
    ).tensors
    assert len(written) == 150 and max(written) <= 4
    entries = json.loads(arrays["prompt_logprobs"][0])
    assert len(entries) == 100 and entries[0] is None
    assert entries[1]["1"] == {"logprob": -1.5, "rank": 1, "decoded_token": " <1>"}
    assert arrays["logprobs"][0].decode() == dumps([{"5": {"logprob": -1.0, "rank": 1, "decoded_token": " <5>"}}] * 50)


@pytest.mark.parametrize(
    ("normalize", "dimensions", "expected"), [(True, None, [0.6, 0.0, 0.8]), (True, 1, [1.0]), (False, 2, [3.0, 0.0])]
)
def test_an_embedding_is_shortened_normalised_and_sent_once(
    triton_io: types.ModuleType, normalize: bool, dimensions: int | None, expected: list[float]
) -> None:
    sampling = SamplingParams(pooling="last", normalize=normalize, dimensions=dimensions)
    for as_text in (False, True):
        request = Request(
            text="x",
            input_ids=None,
            sampling=sampling,
            outputs=Outputs(),
            stream=False,
            prepend_prompt=False,
            arrival=0.0,
            task="embed",
        )
        request = msgspec.structs.replace(request, embedding_as_text=as_text)
        report = PromptEmbedding(1, np.array([3, 0, 4], np.float32).tobytes())
        delta = embedding_delta(
            Delta(text="t", token_ids=(9,), num_input_tokens=5, finish_reason="length"), report, request
        )
        arrays = triton_io.response_of(
            [delta],
            Outputs(output_ids=True, num_input_tokens=True, num_output_tokens=True, finish_reason=True),
            spelled,
            new_tensors(),
        ).tensors
        np.testing.assert_allclose(arrays["embedding"], np.array(expected, np.float32), rtol=1e-6)
        assert arrays["embedding"].dtype == np.float32
        assert [
            arrays[name].tolist() for name in ("output_ids", "num_input_tokens", "num_output_tokens", "finish_reason")
        ] == [[], [5], [0], [b"stop"]]
        assert arrays["text_output"][0].decode() == (json.dumps(arrays["embedding"].tolist()) if as_text else "")


def test_an_unfinished_response_says_none_as_the_vllm_backend_does(triton_io: types.ModuleType) -> None:
    response = triton_io.response_of([Delta(text="a")], Outputs(finish_reason=True), spelled, new_tensors())
    assert response.tensors["finish_reason"].tolist() == [b"None"]


def test_the_python_backends_own_parameters_are_left_to_it(triton_io: types.ModuleType) -> None:
    parameters = {
        "EXECUTION_ENV_PATH": {"string_value": "/x.tar.gz"},
        "FORCE_CPU_ONLY_INPUT_TENSORS": {"string_value": "yes"},
        "page_size": {"string_value": "32"},
    }
    assert triton_io.engine_options(parameters) == {"page_size": "32"}


def test_several_sequences_have_an_entry_each(triton_io: types.ModuleType) -> None:
    deltas = (
        Delta(index=1, text="b", token_ids=(4,)),
        Delta(index=3, text="", token_ids=(5, 6), finish_reason="length"),
    )
    outputs = Outputs(finish_reason=True, num_output_tokens=True, output_ids=True, sequence_index=True)
    arrays = triton_io.response_of(deltas, outputs, str, new_tensors()).tensors
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "text_output": [b"b", b""],
        "sequence_index": [1, 3],
        "finish_reason": [b"None", b"length"],
        "num_output_tokens": [1, 2],
        "output_ids": [4, 5, 6],
    }
