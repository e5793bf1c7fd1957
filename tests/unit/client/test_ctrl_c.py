"""Ctrl-C ends what waits for it and nothing else, whatever the main thread does when it comes."""

from __future__ import annotations

import io
import itertools
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")

import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from paged_client.chat import ChatSession, Conversation, Reader
from paged_client.chat_tools import Reading
from paged_client.client import PagedClient
from paged_client.ctrl_c import CtrlC
from paged_client.openai.answer_forms import ChatForm
from paged_client.openai.formats.parser import AnswerForm

PIECE = (
    b'data: {"text_output":"a ","output_ids":1,"finish_reason":"None","num_input_tokens":3,"num_cached_tokens":0}\n\n'
)


@pytest.fixture(autouse=True)
def pythons_own_way() -> Iterator[None]:
    """A test run in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


# ---- places that wait for it


def test_ctrl_c_is_kept_until_something_waits_for_it() -> None:
    heard = []
    with CtrlC() as ctrl_c:
        press()
        with ctrl_c.calls(lambda: heard.append("called")):
            assert heard == ["called"]
        with ctrl_c.calls(lambda: heard.append("called again")):
            pass
        press()
        with pytest.raises(KeyboardInterrupt), ctrl_c.raises():
            heard.append("never")
    assert heard == ["called"]


def test_ctrl_c_that_nothing_waited_for_raises_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), CtrlC():
        press()


def test_a_second_ctrl_c_raises_wherever_the_program_hangs() -> None:
    called = []
    with CtrlC() as ctrl_c:
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
        with ctrl_c.calls(lambda: called.append(1)):
            press()
            assert called == [1]
            with pytest.raises(KeyboardInterrupt):
                press()
        with ctrl_c.raises():
            with pytest.raises(KeyboardInterrupt):
                press()
            press()
            with pytest.raises(KeyboardInterrupt):
                press()
    assert called == [1]


@pytest.mark.parametrize("other", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "the program's own"])
def test_who_deals_with_sigint_otherwise_goes_on_doing_so(other: Any) -> None:
    signal.signal(signal.SIGINT, other)
    with CtrlC() as ctrl_c, ctrl_c.calls(lambda: pytest.fail("it was heard")):
        press()
    assert signal.getsignal(signal.SIGINT) is other


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    seen = []

    def enter() -> None:
        with CtrlC() as ctrl_c, ctrl_c.raises():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_at_its_end_ctrl_c_raises_as_before() -> None:
    with CtrlC():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- answers


class Triton:
    """tritonclient's client of one stream, with a server behind it: a thread that hands over piece after piece, and
    says so if the call is cancelled.
    """

    pieces = 0  # of an answer; then it waits
    ends = True  # with the last piece
    threads: list[threading.Thread] = []

    def __init__(self, *_: object, **__: object) -> None:
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()

    def start_stream(self, callback: Callable[..., None]) -> None:
        self._thread = threading.Thread(target=self._answer, args=(callback,), daemon=True)
        self._thread.start()
        self.threads.append(self._thread)

    def async_stream_infer(self, *_: object, **__: object) -> None:
        self._events.put("asked")

    def stop_stream(self, cancel_requests: bool) -> None:
        self._events.put("cancelled" if cancel_requests else "closed")
        self._thread.join()

    def is_model_ready(self, *_: object, **__: object) -> bool:
        return True

    def close(self) -> None: ...

    def _answer(self, callback: Callable[..., None]) -> None:
        event = self._events.get()
        for number in range(self.pieces if event == "asked" else 0):
            callback(_result(f"w{number} ", self.ends and number == self.pieces - 1), None)
        if event == "asked":
            event = self._events.get()
        if event == "cancelled":
            callback(None, InferenceServerException("Locally cancelled by application!", "StatusCode.CANCELLED"))


def _result(text: str, final: bool) -> InferResult:
    response = service_pb2.ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = final
    outputs: Mapping[str, Any] = {
        "text_output": text,
        "finish_reason": "length" if final else "None",
        "output_ids": 1,
        "num_input_tokens": 3,
        "num_cached_tokens": 0,
    }
    for name, value in outputs.items():
        kind = "BYTES" if isinstance(value, str) else "INT32"
        response.outputs.add(name=name, datatype=kind, shape=[1])
        array = (
            serialize_byte_tensor(np.array([value.encode()], np.object_))
            if kind == "BYTES"
            else np.array([value], np.int32)
        )
        response.raw_output_contents.append(array.tobytes() if kind == "INT32" else array.item())
    return InferResult(response)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> type[Triton]:
    monkeypatch.setattr("tritonclient.grpc.InferenceServerClient", Triton)
    monkeypatch.setattr(Triton, "threads", [])
    return Triton


@contextmanager
def http_server(pieces: int) -> Iterator[tuple[str, threading.Thread]]:
    """Its URL, and a thread that answers one request with so many pieces and then waits until the caller is gone."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            caller, _ = door.accept()
            with caller:
                caller.recv(65536)
                if pieces:
                    caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + PIECE * pieces)
                while caller.recv(65536):
                    pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{door.getsockname()[1]}", thread


@pytest.mark.parametrize("pieces", [0, 2])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("whence", ["signal", "thread"])
def test_stop_wakes_who_waits_for_the_next_piece_and_cancels(
    triton: type[Triton], monkeypatch: pytest.MonkeyPatch, protocol: str, pieces: int, whence: str
) -> None:
    monkeypatch.setattr(triton, "pieces", pieces)
    monkeypatch.setattr(triton, "ends", False)
    with http_server(pieces) as (http_url, server), CtrlC() as ctrl_c:
        with PagedClient("localhost:1" if protocol == "grpc" else http_url) as client:
            stream = client.stream("hello")

            def stop() -> None:
                if whence == "signal":
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    stream.stop()

            timer = threading.Timer(0.05, stop)
            came = []
            with stream, ctrl_c.calls(stream.stop):
                if not pieces:
                    timer.start()
                for delta in stream:
                    came.append(delta.text)
                    if len(came) == pieces:
                        timer.start()
            assert len(came) == pieces and stream.stopped
        for thread in triton.threads if protocol == "grpc" else [server]:
            thread.join(30)
            assert not thread.is_alive(), "it heard that the caller is gone"


def test_a_stream_that_is_stopped_before_it_begins_asks_nothing(triton: type[Triton]) -> None:
    with PagedClient("localhost:1") as client:
        stream = client.stream("hello")
        stream.stop()
        assert list(stream) == [] and not triton.threads


class Keyboard:
    """Asks a question and leaves; at the n-th moment between the two comes a Ctrl-C. A moment is what Python may raise
    KeyboardInterrupt at: the beginning of a function, and the return of a built-in one.
    """

    def __init__(self, moment: int) -> None:
        self.pressed = False
        self._left = moment
        self._lines = ["Where is the lamp?", "/system", "/exit"]

    def input(self, prompt: str = "") -> str:
        sys.setprofile(None)
        line = self._lines.pop(0)
        if line.startswith("Where"):
            sys.setprofile(self._passed)
        return line

    def _passed(self, frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_return"):
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                self.pressed = True
                press()


# four moments in a row are enough to lose a console for ever
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 4], ids=["each", "every fourth"])
def test_ctrl_c_at_any_moment_of_an_answer_is_heard_once_and_the_chat_goes_on(
    triton: type[Triton], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(triton, "pieces", 2)
    plain = Reading(ChatForm(AnswerForm()), {})
    reader = Reader({}, plain, plain)
    with PagedClient("localhost:1") as client:
        for moment in itertools.count(0, step):  # 0: nobody presses anything, and what is imported on the way is there
            keyboard, screen = Keyboard(moment), io.StringIO()
            monkeypatch.setattr("builtins.input", keyboard.input)
            console = Console(file=screen, highlight=False, markup=False)
            try:
                ChatSession(client, Conversation(), reader, console).run()
            except KeyboardInterrupt:  # of pytest's, otherwise
                pytest.fail(f"moment {moment}: Ctrl-C left the chat")
            shown = screen.getvalue()
            assert shown.endswith("no system message\n"), (moment, shown)
            if moment and not keyboard.pressed:
                break
            assert shown.count("stopped: ") + shown.count("Ctrl-D leaves") == keyboard.pressed, (moment, shown)
            assert not any(thread.is_alive() for thread in triton.threads), moment
            triton.threads.clear()
    assert moment > 500
