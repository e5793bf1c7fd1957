"""A stand-in for the library that Triton Server's stub provides, and what its server does with answers."""

from __future__ import annotations

import importlib
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest


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


@contextmanager
def triton_io_with_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """frontend/triton_io.py, imported with this stand-in."""
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
