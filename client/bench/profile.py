"""Reads perf_analyzer's profile exports: when each request went out, when each response came, and how many tokens it
held.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray


class CutExportError(Exception):
    """The export ends in the middle: perf_analyzer met a NaN among outputs that the response did not hold."""


@dataclass(frozen=True)
class Trace:
    """One request as the client saw it."""

    sent: int  # nanoseconds since 1970
    arrivals: NDArray[np.int64]  # of responses that held tokens, nanoseconds since 1970
    tokens: NDArray[np.int64]  # in each of them
    asked: int  # tokens asked for

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())


class _Inputs(msgspec.Struct):
    sampling_parameters: str = ""


class _Outputs(msgspec.Struct):
    text_output: Any = ""
    num_output_tokens: Any = None


class _Request(msgspec.Struct):
    timestamp: int
    request_inputs: _Inputs
    response_timestamps: list[int]
    response_outputs: list[_Outputs]


class _Experiment(msgspec.Struct):
    requests: list[_Request]


class _Export(msgspec.Struct):
    experiments: list[_Experiment]


def read_profile(files: Sequence[Path], *, counted: bool) -> list[Trace]:
    """The requests of all `files` (of load processes that ran at the same time), in the order in which they were sent.

    counted: tokens are counted from the output num_output_tokens; else a request is taken to have brought the tokens
    that it asked for (max_tokens with ignore_eos), the first response one of them and the others equal shares of the
    rest.

    Raises:
        CutExportError: a file is not whole.
    """
    traces = [_trace(request, counted) for file in files for request in _read(file)]
    return sorted(traces, key=lambda trace: trace.sent)


def _read(file: Path) -> list[_Request]:
    text = file.read_bytes()
    try:
        export = msgspec.json.decode(text, type=_Export)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:  # some servers' pieces of text are cut inside a character
            export = msgspec.convert(json.loads(text.decode(errors="replace"), strict=False), _Export)
        except ValueError:
            raise CutExportError(file.name) from None
    return [request for experiment in export.experiments for request in experiment.requests]


def _trace(request: _Request, counted: bool) -> Trace:
    asked = int(json.loads(request.request_inputs.sampling_parameters)["max_tokens"])
    arrivals = np.array(request.response_timestamps, np.int64)
    outputs = request.response_outputs
    if counted:
        tokens = np.array([_count(output, asked) for output in outputs], np.int64)
        if outputs and outputs[-1].text_output == "" and tokens[:-1].sum() == asked:
            tokens[-1] = 0  # nothing but the final flag
    else:
        tokens = _shares(asked, [output.text_output != "" for output in outputs])
    held = tokens > 0
    return Trace(request.timestamp, arrivals[held], tokens[held], asked)


def _count(output: _Outputs, asked: int) -> int:
    """For a response without a count perf_analyzer may show leftover bytes."""
    count = output.num_output_tokens
    return count if isinstance(count, int) and 0 < count <= asked else 0


def _shares(asked: int, held: Sequence[bool]) -> NDArray[np.int64]:
    """`asked` tokens over the responses that held text: one in the first, the others as evenly as whole numbers
    allow.
    """
    shares = np.zeros(len(held), np.int64)
    places = np.flatnonzero(held)
    if len(places) == 1:
        shares[places] = asked
    elif len(places):
        shares[places[0]] = 1
        bounds = np.round(np.linspace(0, asked - 1, len(places))).astype(np.int64)
        shares[places[1:]] = np.diff(bounds)
    return shares
