"""Stopping and reloading: live streams finish or are told, and nothing stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from tests.chaos.reloads import KEPT, run_reloads
from tests.server import fake_engine
from tests.server.front_end_server import MODEL, FrontEndServer, send, serving

pytestmark = pytest.mark.server
TOKENIZER = fake_engine.make_tokenizer()
WAIT_SECONDS = 60.0


class Listener:
    """One request on a stream of its own, read until its end; then the stream is closed, as Triton Server 2.51.0 needs
    to stop.
    """

    def __init__(self, server: FrontEndServer, prompt: str) -> None:
        self.texts: list[str] = []
        self.error = ""
        self.num_finals = 0
        self.ended = threading.Event()
        self._client = grpc.InferenceServerClient(server.grpc)
        self._client.start_stream(self._take)
        send(self._client, prompt, stream=True)

    def _take(self, result: Any, error: InferenceServerException | None) -> None:
        if error is not None:
            self.error = error.message()
            self.ended.set()
            return
        if result.as_numpy("text_output") is not None:
            self.texts.append(result.as_numpy("text_output")[0].decode())
        if result.get_response().parameters["triton_final_response"].bool_param:
            self.num_finals += 1
            self.ended.set()

    def close(self) -> None:
        assert self.ended.wait(WAIT_SECONDS), "no final response"
        self._client.stop_stream()
        self._client.close()


def test_a_stop_lets_streams_finish_and_tells_those_that_would_not(tmp_path: Path) -> None:
    prefix = f"drain-{time.monotonic_ns()}-"
    arguments = ["--exit-timeout-secs=24", f"--backend-config=python,shm-region-prefix-name={prefix}"]
    with serving(tmp_path, instances=2, arguments=arguments) as server:
        short = [Listener(server, f"tokens=60 delay=0.02 {number}") for number in range(4)]
        endless = [Listener(server, f"silent {number}") for number in range(2)]
        server.wait_for('paged_requests{state="running"}', 6, seconds=WAIT_SECONDS)
        server.process.terminate()
        for listener in short + endless:
            listener.close()
        assert server.process.wait(WAIT_SECONDS) == 0
        for number, listener in enumerate(short):
            assert (listener.error, listener.num_finals) == ("", 1)
            assert "".join(listener.texts) == TOKENIZER.decode(
                fake_engine.answer_ids(TOKENIZER, f"tokens=60 delay=0.02 {number}", 60)
            )
        assert [listener.error for listener in endless] == ["the model is being unloaded"] * 2
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


@pytest.mark.long
def test_loading_and_unloading_leaves_nothing_behind(tmp_path: Path) -> None:
    """50 times by hand: python -m tests.chaos.reloads."""
    report = run_reloads(tmp_path, times=4)
    first, last = report["first"], report["last"]
    assert all(last[name] <= first[name] for name in KEPT), (first, last)
    assert report["growth"] < 0.1
    assert report["exit_code"] == 0 and report["left"] == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndServer]:
    # After a load that failed, Triton Server 2.51.0 counts a model that is gone as live until its exit timeout.
    with serving(tmp_path_factory.mktemp("server"), instances=2, arguments=["--exit-timeout-secs=8"]) as running:
        yield running


@pytest.mark.long
@pytest.mark.parametrize(
    "broken",
    [pytest.param("model.py", marks=pytest.mark.long), "engine", pytest.param("config", marks=pytest.mark.long)],
)
def test_a_broken_reload_leaves_the_old_model_serving(server: FrontEndServer, broken: str) -> None:
    folder = server.log.parent / "repository" / MODEL
    files = {path: path.read_text() for path in (folder / "config.pbtxt", folder / "1" / "model.py")}
    config, model = files
    if broken == "model.py":
        model.write_text("raise ValueError('a new version that does not load')\n")
    elif broken == "engine":
        config.write_text(files[config].replace('"fake"', '"broken"'))
    else:
        config.write_text(files[config].replace("max_num_sequences", "max_num_sequenzes"))
    with closing(grpc.InferenceServerClient(server.grpc)) as client, pytest.raises(InferenceServerException):
        client.load_model(MODEL, client_timeout=WAIT_SECONDS)
    assert server.ask("tokens=3").text == TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, "tokens=3", 3))
    deadline = time.monotonic() + WAIT_SECONDS  # the one of the reload before may still be ending
    while len(server.engine_pids()) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for path, text in files.items():
        path.write_text(text)
    server.load()
    assert server.ask("tokens=3").text == TOKENIZER.decode(fake_engine.answer_ids(TOKENIZER, "tokens=3", 3))
