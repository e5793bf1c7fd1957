"""Output tensors that are made once for what is said over and over."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from paged_backend.frontend.response_tensors import ResponseTensors, ThreadsTensors


class Made:
    """A stand-in for the server's tensor."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array


def _said(tensor: Any) -> tuple[str, list[Any], str]:
    return tensor.name, tensor.array.tolist(), str(tensor.array.dtype)


@pytest.mark.parametrize("texts", [["é"], [""], ["x" * 24], ["x" * 25], ["a", "b"]], ids=str)
def test_texts_are_bytes_whether_remembered_or_not(texts: list[str]) -> None:
    tensors = ResponseTensors(Made)
    for _ in range(2):
        assert _said(tensors.strings("text_output", texts)) == ("text_output", [t.encode() for t in texts], "object")


def test_a_tensor_is_made_once_for_each_name_value_and_type() -> None:
    tensors = ResponseTensors(Made)
    assert tensors.strings("text_output", ["a"]) is tensors.strings("text_output", ("a",))
    assert tensors.numbers("num_cached_tokens", [1], np.uint32) is tensors.numbers("num_cached_tokens", [1], np.uint32)
    assert _said(tensors.strings("finish_reason", ["a"])) == ("finish_reason", [b"a"], "object")
    assert _said(tensors.numbers("num_cached_tokens", [1], np.int32)) == ("num_cached_tokens", [1], "int32")
    assert _said(tensors.numbers("num_input_tokens", [1], np.uint32)) == ("num_input_tokens", [1], "uint32")


def test_what_hardly_comes_again_pushes_nothing_out() -> None:
    tensors = ResponseTensors(Made)
    first = tensors.strings("text_output", ["a"])
    for number in range(2000):
        tensors.strings("text_output", [f"a piece of more than two dozen characters {number}"])
        assert _said(tensors.numbers("cumulative_logprob", [number / 8], np.float32))[1] == [number / 8]
    assert tensors.strings("text_output", ["a"]) is first


def test_no_more_than_a_thousand_are_remembered() -> None:
    tensors = ResponseTensors(Made)
    first = tensors.strings("text_output", ["0"])
    for number in range(1, 1025):
        tensors.strings("text_output", [str(number)])
    assert tensors.strings("text_output", ["0"]) is not first


def test_no_tensor_is_another_threads() -> None:
    """Two sends at once would write it into the server's memory at once."""
    tensors = ThreadsTensors(Made)
    others: list[Any] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: others.append(tensors.own.strings("text_output", ["a"])))
        thread.start()
        thread.join()
    assert len({id(each) for each in (*others, tensors.own.strings("text_output", ["a"]))}) == 3


def test_tensors_go_with_their_thread_without_the_garbage_collector() -> None:
    """A tensor that is left when the server has taken its memory away crashes the stub."""
    tensors, made = ThreadsTensors(Made), []

    def send() -> None:
        made.append(weakref.ref(tensors.own.strings("text_output", ["a"])))
        made.append(weakref.ref(tensors.own.numbers("num_cached_tokens", [1], np.uint32)))

    gc.disable()
    try:
        sender = threading.Thread(target=send)
        sender.start()
        sender.join()
        assert len(made) == 2 and not any(tensor() for tensor in made)
    finally:
        gc.enable()
