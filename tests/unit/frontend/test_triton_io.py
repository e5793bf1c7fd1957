"""Triton Server's side, with a stand-in for the library that its stub provides: codes, tensors, metrics."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.embeddings import embedding_delta
from paged_backend.frontend.prompt_logprobs import PromptTable
from paged_backend.frontend.response_tensors import ResponseTensors
from paged_backend.log_lines import without_stamp
from paged_backend.messages import PromptEmbedding
from paged_backend.request import Outputs, Request, SamplingParams
from tests.server import fake_engine

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]
TOKENIZER = fake_engine.make_tokenizer()


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class FakeError:
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor] | None = None, error: FakeError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class FakeMetric:
    def __init__(self, labels: dict[str, str], buckets: list[float] | None = None) -> None:
        self.labels, self.buckets, self.value, self.observed = labels, buckets, 0.0, []

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, value: float) -> None:
        self.value += value

    def observe(self, value: float) -> None:
        self.observed.append(value)


class FakeFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    created: dict[str, list[FakeMetric]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.metrics = FakeFamily.created.setdefault(name, [])

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> FakeMetric:  # noqa: N802 - the server's name
        self.metrics.append(FakeMetric(labels, buckets))
        return self.metrics[-1]


class FakeSender:
    """As strict as the server: it crashes if asked for cancellation during or after the final response."""

    misuses: list[str] = []

    def __init__(self) -> None:
        self.responses: list[tuple[FakeResponse, int]] = []
        self.cancelled = False
        self.final = threading.Event()
        self.fails = False
        self._asking = False
        self._ending = False

    def send(self, response: FakeResponse, flags: int = 0) -> None:
        if self._ending:
            FakeSender.misuses.append("a response after the final one")
        if flags and self._asking:
            FakeSender.misuses.append("a final response during a question for cancellation")
        self._ending = bool(flags)
        time.sleep(0.0005)
        self.responses.append((response, flags))
        if flags:
            self.final.set()
        elif self.fails:
            raise RuntimeError("the client is gone")

    def is_cancelled(self) -> bool:
        self._asking = True
        time.sleep(0.0005)
        if self._ending:
            FakeSender.misuses.append("a question for cancellation during or after the final response")
        self._asking = False
        return self.cancelled

    @property
    def text(self) -> str:
        return b"".join(
            response.tensors["text_output"][0] for response, _ in self.responses if response.error is None
        ).decode()

    @property
    def error(self) -> FakeError | None:
        return self.responses[-1][0].error


class FakeRequest:
    def __init__(self, parameters: str = "", **values: Any) -> None:
        self._parameters = parameters
        self._tensors = []
        for name, value in values.items():
            array = (
                np.array([value])
                if isinstance(value, bool)
                else np.array([value.encode() if isinstance(value, str) else value], np.object_)
            )
            self._tensors.append(FakeTensor(name, array))
        self.sender = FakeSender()
        self.caller_id = ""

    def get_response_sender(self) -> FakeSender:
        return self.sender

    def inputs(self) -> list[FakeTensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return self.caller_id


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module, imported with a stand-in for the stub's library."""
    library = types.ModuleType("triton_python_backend_utils")
    FakeFamily.created = {}
    for name, value in {
        "Tensor": FakeTensor,
        "TritonError": FakeError,
        "InferenceResponse": FakeResponse,
        "MetricFamily": FakeFamily,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
        "TritonModelException": type("TritonModelException", (Exception,), {}),
    }.items():
        setattr(library, name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", library)
    monkeypatch.delitem(sys.modules, "paged_backend.frontend.triton_io", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield importlib.import_module("paged_backend.frontend.triton_io")
    sys.modules.pop("paged_backend.frontend.triton_io", None)


def _arguments(**options: str) -> dict[str, str]:
    parameters = {name: {"string_value": value} for name, value in {"model": "fake", **options}.items()}
    groups = [{"count": 1, "kind": "KIND_MODEL", "gpus": []}]
    tensors = {
        "input": [{"name": "text_input"}],
        "output": [{"name": "text_output"}],
        "model_transaction_policy": {"decoupled": True},
    }
    config = json.dumps({"parameters": parameters, "instance_group": groups, **tensors})
    return {
        "model_config": config,
        "model_name": "m",
        "model_instance_name": "m_0_0",
        "model_version": "1",
        "model_repository": "/r",
    }


@pytest.fixture
def model(triton_io: types.ModuleType) -> Iterator[Any]:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    instance.initialize(_arguments(log_requests="true"))
    FakeSender.misuses = []
    yield instance
    instance.finalize()
    assert FakeSender.misuses == []


def _answered(model: Any, seconds: float = 5, **values: Any) -> FakeSender:
    request = FakeRequest(**values)
    model.execute([request])
    assert request.sender.final.wait(seconds)
    return request.sender


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _series(family: str, **labels: str) -> FakeMetric:
    (metric,) = [
        metric for metric in FakeFamily.created[family] if metric.labels == {"model": "m", "version": "1", **labels}
    ]
    return metric


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


def test_a_load_that_fails_is_one_sentence(triton_io: types.ModuleType) -> None:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    with pytest.raises(triton_io.pb_utils.TritonModelException, match="^model 'broken': the checkpoint is broken$"):
        instance.initialize(_arguments(model="broken"))
    with pytest.raises(
        triton_io.pb_utils.TritonModelException, match="^the model's config declares no input of text_input"
    ):
        instance.initialize({**_arguments(), "model_config": json.dumps({"parameters": {}})})
    with pytest.raises(
        triton_io.pb_utils.TritonModelException, match="^unknown parameter 'page_sise': did you mean 'page_size'"
    ):
        instance.initialize(_arguments(page_sise="1"))


def test_a_request_is_answered_in_pieces_or_at_once(model: Any) -> None:
    prompt = "tokens=9 delay=0.01"
    expected = TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, prompt, 9))
    streamed = _answered(model, text_input=prompt, stream=True)
    assert streamed.text == expected
    assert len(streamed.responses) > 3
    whole = _answered(model, text_input=prompt)
    assert whole.text == prompt + expected
    assert len(whole.responses) == 1
    assert _answered(model, text_input=prompt, exclude_input_in_output=True).text == expected


def test_execute_returns_before_the_answer(model: Any) -> None:
    requests = [FakeRequest(text_input="silent") for _ in range(20)]
    started = time.perf_counter()
    model.execute(requests)
    assert time.perf_counter() - started < 0.5
    for request in requests:
        request.sender.cancelled = True
        assert request.sender.final.wait(2)
        assert request.sender.error is not None
        assert (request.sender.error.message, request.sender.error.code) == ("the request was cancelled", "CANCELLED")


@pytest.mark.parametrize("fails", [False, True], ids=["answered", "client gone"])
def test_nobody_asks_for_cancellation_during_or_after_the_final_response(
    model: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("paged_backend.frontend.front_end._CANCEL_POLL_SECONDS", 0.0)
    monkeypatch.setattr("paged_backend.frontend.front_end._CANCEL_POLL_SHARE", 1e9)
    requests = [FakeRequest(text_input=f"tokens={5 + number % 20} delay=0.001", stream=True) for number in range(60)]
    for request in requests:
        request.sender.fails = fails
    model.execute(requests)
    for request in requests:
        assert request.sender.final.wait(10)
        # a final response alone does not fail here
        assert (request.sender.error is not None) == (fails and len(request.sender.responses) > 1)
    time.sleep(0.1)
    assert FakeSender.misuses == []


def test_wrong_requests_do_not_hurt_the_right_ones_beside_them(model: Any) -> None:
    bad, good, broken = (
        FakeRequest(text_input=""),
        FakeRequest(text_input="tokens=3"),
        FakeRequest(parameters="nonsense", text_input="x"),
    )
    broken.inputs = lambda: 1 / 0  # type: ignore[assignment, return-value]
    model.execute([bad, good, broken])
    for request, code in ((bad, "INVALID_ARG"), (good, None), (broken, "INTERNAL")):
        assert request.sender.final.wait(5)
        assert getattr(request.sender.error, "code", None) == code
        assert len(request.sender.responses) == 1


def test_metrics_reach_the_server(model: Any) -> None:
    _answered(model, text_input="tokens=9 delay=0.01")
    _answered(model, text_input="")
    _wait(lambda: _series("paged_requests_finished_total", reason="invalid").value == 1)
    _wait(lambda: _series("paged_pages", state="free").value == fake_engine.NUM_PAGES)
    assert _series("paged_requests_finished_total", reason="length").value == 1
    assert _series("paged_generation_tokens_total").value == 9
    assert _series("paged_prompt_tokens_total").value == len(TOKENIZER.encode("tokens=9 delay=0.01").ids)
    assert _series("paged_page_size").value == fake_engine.PAGE_SIZE
    assert _series("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max").value == fake_engine.NUM_PAGES
    (first,) = _series("paged_time_to_first_token_seconds").observed
    whole, refused = _series("paged_request_seconds").observed
    (per_token,) = _series("paged_time_per_output_token_seconds").observed
    assert 0 < first < whole
    assert 0 <= refused < whole
    assert 0.005 < per_token < whole
    assert _series("paged_queue_seconds").observed
    assert _series("paged_request_prompt_tokens").observed == [_series("paged_prompt_tokens_total").value]
    assert _series("paged_request_generation_tokens").observed == [9]


def test_a_logged_request_shows_lengths_and_times_but_no_text(model: Any) -> None:
    stream = io.StringIO()
    (handler, *_) = logging.getLogger("paged").handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    _answered(model, text_input="tokens=9 secret")
    generated = FakeRequest(parameters='{"id": "zz-9"}', text_input="tokens=3 secret")
    named = FakeRequest(text_input="tokens=2 secret")
    named.caller_id = "order 66\npaged: forged" + "x" * 1000
    model.execute([named, generated])
    _wait(lambda: _series("paged_requests_finished_total", reason="length").value == 3)
    assert all(re.match(r"paged: \S+Z \[m\] request ", line) for line in stream.getvalue().splitlines())
    line, second, third = sorted(map(without_stamp, stream.getvalue().splitlines()))
    assert re.match(r"paged: request 0\.\d+ length: \d+ tokens", line)
    assert re.match(r"paged: request order 66\\x0apaged: forgedx+ length: \d+ tokens", second)
    assert third.startswith("paged: request zz-9 length: ")
    assert "9 out" in line
    assert "secret" not in line + second + third
    assert len(second) < 300


def test_a_batch_size_that_means_nothing_is_remarked_on_once(
    triton_io: types.ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        instance = triton_io.TritonPythonModel()
        instance.engine_command = COMMAND
        arguments = _arguments()
        described = {**json.loads(arguments["model_config"]), "max_batch_size": 8}
        instance.initialize(
            {**arguments, "model_config": json.dumps(described), "model_instance_name": f"m_0_{number}"}
        )
        instance.finalize()
    assert capfd.readouterr().err.count("max_batch_size: 8 in config.pbtxt makes no batches") == 1


def test_a_request_that_kills_engines_ends_with_an_error_and_the_model_stays_ready(model: Any) -> None:
    sender = _answered(model, text_input="die", seconds=30)
    assert sender.error is not None
    assert sender.error.code == "INTERNAL"
    assert "the engine died" in sender.error.message
    assert model.is_ready()
    _wait(lambda: _series("paged_engine_restarts_total").value >= 3)


def test_a_model_says_whether_it_takes_requests(triton_io: types.ModuleType) -> None:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    instance.initialize(_arguments(max_engine_restarts="0", on_engine_loss="stay"))
    asked = {"parameters": '{"health_check": true}', "stream": False}
    sender = _answered(instance, **asked)
    assert (sender.error, sender.text, len(sender.responses)) == (None, "", 1)
    os.kill(instance._front_end.client.engine_pid, signal.SIGKILL)
    _wait(lambda: not instance._front_end.alive)
    sender = _answered(instance, **asked)
    assert sender.error is not None
    assert (sender.error.message, sender.error.code) == ("the model has no engine any more", "UNAVAILABLE")
    instance.finalize()


def test_a_model_of_one_response_a_request_refuses_streams_by_name(triton_io: types.ModuleType) -> None:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    arguments = _arguments()
    described = {**json.loads(arguments["model_config"]), "model_transaction_policy": {"decoupled": False}}
    instance.initialize({**arguments, "model_config": json.dumps(described)})
    sender = _answered(instance, text_input="tokens=3", stream=True)
    assert sender.error is not None and sender.error.code == "INVALID_ARG"
    assert re.match("stream: true is not possible.*decoupled: false", sender.error.message)
    sender = _answered(instance, text_input="tokens=3")
    assert (sender.error, len(sender.responses)) == (None, 1)
    instance.finalize()


def test_finalize_waits_for_live_requests(triton_io: types.ModuleType) -> None:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    instance.initialize(_arguments())
    request = FakeRequest(text_input="tokens=20 delay=0.02", stream=True)
    instance.execute([request])
    instance.finalize()
    assert request.sender.error is None
    assert request.sender.text == TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, "tokens=20 delay=0.02", 20))


def test_requests_that_outlast_the_drain_end_as_unavailable(triton_io: types.ModuleType) -> None:
    instance = triton_io.TritonPythonModel()
    instance.engine_command = COMMAND
    instance.initialize(_arguments())
    request = FakeRequest(text_input="silent")
    instance.execute([request])
    instance._front_end.close(drain_seconds=0.1)
    instance.finalize()
    assert request.sender.error is not None
    assert (request.sender.error.message, request.sender.error.code) == ("the model is being unloaded", "UNAVAILABLE")


def test_a_front_end_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """3 seconds and 300 MB for each instance."""
    (tmp_path / "triton_python_backend_utils.py").write_text("")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import paged_backend.frontend.triton_io; print({'torch', "
        "'transformers', 'triton'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert out.stdout.strip() == "set()"


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
