"""Triton Server's side, with a stand-in for the library that its stub provides: codes, tensors, metrics."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paged_backend.log_lines import without_stamp
from tests.server import fake_engine
from tests.stub_library import (
    FakeFamily,
    FakeMetric,
    FakeRequest,
    FakeSender,
    triton_io_with_it,
)

COMMAND = [sys.executable, str(Path(fake_engine.__file__))]
TOKENIZER = fake_engine.make_tokenizer()


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    with triton_io_with_it(monkeypatch) as module:
        yield module


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
    monkeypatch.setattr("paged_backend.frontend.front_end._SECONDS_A_QUESTION", 0.0)
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


# in CI: tests/unit/engine_client/test_client.py
@pytest.mark.long
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
