"""Front ends from load to unload in a real tritonserver: broken engines, reloads, drains, kills."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.frontend import server_death_process
from paged_backend.process_id import ProcessId
from tests.server import fake_engine
from tests.server.front_end_server import MODEL, WITH_FAKE_ENGINE, Answer, FrontEndServer, send, serving, take

pytestmark = pytest.mark.server
TOKENIZER = fake_engine.make_tokenizer()
# what an unload may wait for in vain: 10 s for an engine's exit, 20 s for requests; else it takes 1.1 s an instance
_NOBODY_WAITED_SECONDS = 9.0


def _expected(prompt: str, num_tokens: int) -> str:
    return TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, prompt, num_tokens))


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _configure(server: FrontEndServer, model: str) -> None:
    path = server.log.parent / "repository" / MODEL / "config.pbtxt"
    lines = path.read_text()
    start = lines.index("string_value", lines.index('"model"'))
    path.write_text(lines[:start] + f'string_value: "{model}"' + lines[lines.index("\n", start) :])


class _Streams:
    """Requests in the background, each on a gRPC stream of its own (an error does not say which request it is about),
    and what came of them.
    """

    def __init__(self, server: FrontEndServer, prompts: list[str]) -> None:
        self.answers = [Answer() for _ in prompts]
        self._arrived: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
        self._clients = [grpc.InferenceServerClient(server.grpc) for _ in prompts]
        for number, (client, prompt) in enumerate(zip(self._clients, prompts, strict=True)):
            client.start_stream(lambda result, error, number=number: self._arrived.put((number, result, error)))
            send(client, prompt, stream=True)

    def wait(self, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        left_early = True
        try:
            while any(not answer.num_finals for answer in self.answers):
                number, result, error = self._arrived.get(timeout=max(0, deadline - time.monotonic()))
                take((result, error), [self.answers[number]])
            left_early = False
        finally:
            for client in self._clients:
                # a cancellation around the final response may keep Triton Server 2.51.0 from unloading
                client.stop_stream(cancel_requests=left_early)
                client.close()


# in CI: without a server in tests/unit/engine_client/test_restarts.py, with a model in test_engine_death.py
@pytest.mark.long
@pytest.mark.parametrize("instances", [1, 4])
def test_streams_do_not_notice_that_their_engine_was_killed(tmp_path: Path, instances: int) -> None:
    with serving(tmp_path, instances=instances) as server:
        # the first of them still runs when the last has begun, on a busy machine too
        prompts = [f"tokens=200 delay=0.05 {number}" for number in range(8)]
        streams = _Streams(server, prompts)
        server.wait_for('paged_requests{state="running"}', 8, seconds=20)
        os.kill(server.engine_pids()[0], signal.SIGKILL)
        streams.wait(60)
        for prompt, answer in zip(prompts, streams.answers, strict=True):
            assert answer.error is None
            assert answer.num_finals == 1
            assert answer.text == _expected(prompt, 200)
        server.wait_for("paged_engine_restarts_total", 1, seconds=20)
        assert server.unload() < _NOBODY_WAITED_SECONDS
        server.load()
        assert server.ask("tokens=3").text == _expected("tokens=3", 3)


def test_a_broken_load_says_why_and_does_not_poison_the_next(tmp_path: Path) -> None:
    with serving(tmp_path, instances=3, load=False) as server:
        for model, sentence in (
            ("broken", "model 'broken': the checkpoint is broken"),
            ("crash", "the engine process ended .* before it was ready"),
        ):
            _configure(server, model)
            with pytest.raises(InferenceServerException, match=sentence):
                server.load()
        _configure(server, "fake")
        server.load()
        assert server.ask("tokens=3").text == _expected("tokens=3", 3)
        assert len(server.engine_pids()) == 1


def test_an_unload_lets_live_requests_finish(tmp_path: Path) -> None:
    with serving(tmp_path, instances=2) as server:
        prompts = [f"tokens=100 delay=0.01 {number}" for number in range(8)]
        streams = _Streams(server, prompts)
        server.wait_for('paged_requests{state="running"}', 8)
        unloading = threading.Thread(target=server.unload)
        unloading.start()
        streams.wait()
        for prompt, answer in zip(prompts, streams.answers, strict=True):
            assert (answer.error, answer.text) == (None, _expected(prompt, 100))
        unloading.join(10)
        assert not unloading.is_alive()
        assert server.engine_pids() == []


def test_unload_is_quick_after_errors_and_cancellations(tmp_path: Path) -> None:
    """A response sender that anybody still refers to would keep the model from unloading."""
    with serving(tmp_path, instances=1) as server:
        folder = server.socket_folder()
        server.ask("")
        server.ask("error")
        server.ask("tokens=50 delay=0.002", stop_words=["w0"])
        with closing(grpc.InferenceServerClient(server.grpc)) as client:
            client.start_stream(lambda result, error: None)
            for number in range(10):
                send(client, "silent", request_id=str(number), stream=True)
            server.wait_for('paged_requests{state="running"}', 10)
            client.stop_stream(cancel_requests=True)
        server.wait_for('paged_requests{state="running"}', 0)
        assert server.unload() < _NOBODY_WAITED_SECONDS
        assert server.engine_pids() == []
        assert not folder.exists()


def test_a_reload_while_requests_run_serves_both(tmp_path: Path) -> None:
    with serving(tmp_path, instances=2) as server:
        old = _Streams(server, ["tokens=150 delay=0.01"] * 4)
        server.wait_for('paged_requests{state="running"}', 4)
        (tmp_path / "repository" / MODEL / "1" / "model.py").touch()
        server.load()
        assert server.ask("tokens=3").text == _expected("tokens=3", 3)
        old.wait()
        assert all(answer.text == _expected("tokens=150 delay=0.01", 150) for answer in old.answers)
        _wait(lambda: len(server.engine_pids()) == 1, 8)


def test_a_terminated_server_leaves_no_engine_and_no_sockets(tmp_path: Path) -> None:
    with serving(tmp_path, instances=2) as server:
        engines, folder = server.engine_pids(), server.socket_folder()
        server.process.terminate()
        assert server.process.wait(15) == 0
        assert not any(ProcessId.of(pid) for pid in engines)
        assert not folder.exists()


def test_a_killed_server_takes_its_engine_with_it(tmp_path: Path) -> None:
    with serving(tmp_path, instances=2) as server:
        engines = server.engine_pids()
        server.process.kill()
        _wait(lambda: not any(ProcessId.of(pid) for pid in engines), 20)


def test_a_killed_server_takes_front_ends_with_it_that_hold_the_interpreters_lock_and_their_shared_memory(
    tmp_path: Path,
) -> None:
    """As calls into the stub do that wait for a dead server: no thread of Python's can notice anything."""
    program = f"""{WITH_FAKE_ENGINE}
    def execute(self, requests):
        ctypes.PyDLL(None).pause()  # PyDLL keeps the lock
"""
    prefix = f"locked-{time.monotonic_ns()}-"
    arguments = [f"--backend-config=python,shm-region-prefix-name={prefix}"]
    with serving(
        tmp_path, instances=2, options={"model": "fake"}, model_py=f"import ctypes\n{program}", arguments=arguments
    ) as server:
        processes = [*server.engine_pids(), *server.stub_pids()]
        assert len(processes) == 3 and list(Path("/dev/shm").glob(f"{prefix}*"))
        with closing(grpc.InferenceServerClient(server.grpc)) as client:
            client.start_stream(lambda result, error: None)
            for _ in range(2):
                send(client, "tokens=3", stream=True)
            time.sleep(1)
            server.process.kill()
            _wait(lambda: not any(ProcessId.of(pid) for pid in processes), server_death_process.GRACE_SECONDS + 8)
        _wait(lambda: not list(Path("/dev/shm").glob(f"{prefix}*")), 2)


def test_without_decoupled_responses_infer_works_streams_are_refused_and_the_unload_ends(tmp_path: Path) -> None:
    """LiteLLM's `triton/…/infer` and other clients of the plain protocol want one response."""
    with serving(tmp_path, instances=2, load=False) as server:
        path = tmp_path / "repository" / MODEL / "config.pbtxt"
        path.write_text(path.read_text().replace("decoupled: true", "decoupled: false"))
        server.load()
        body = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["tokens=3"]}]}
        body["inputs"] += [{"name": "exclude_input_in_output", "shape": [1], "datatype": "BOOL", "data": [True]}]
        request = urllib.request.Request(f"http://{server.http}/v2/models/{MODEL}/infer", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            (output,) = (output for output in json.load(answer)["outputs"] if output["name"] == "text_output")
        assert output["data"] == [_expected("tokens=3", 3)]
        refused = server.ask("tokens=3", stream=True)
        assert "stream: true is not possible" in str(refused.error)
        assert server.ask("tokens=3", stream=False, exclude_input_in_output=True).text == _expected("tokens=3", 3)
        assert server.unload() < _NOBODY_WAITED_SECONDS


def test_a_partial_config_at_a_load_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """It replaces config.pbtxt: the model would be ready and refuse every request."""
    with serving(tmp_path, load=False) as server:
        given = {"backend": "python", "parameters": {"max_model_len": {"string_value": "64"}}}
        with (
            closing(grpc.InferenceServerClient(server.grpc)) as client,
            pytest.raises(InferenceServerException, match="declares no input of text_input"),
        ):
            client.load_model(MODEL, config=json.dumps(given))
        server.load()
        assert server.ask("tokens=3").error is None
