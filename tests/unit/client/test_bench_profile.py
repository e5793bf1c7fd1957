"""Reading perf_analyzer's exports. The recorded ones are of perf_analyzer 2.50 and the demo model: four of 64 requests
of 8 tokens with num_output_tokens asked for, and three requests of 6 tokens without, where perf_analyzer shows leftover
bytes in its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_client.bench.profile import CutExportError, read_profile

RECORDED = Path(__file__).parent / "recorded_profiles"
COUNTED, UNCOUNTED = RECORDED / "counted.json", RECORDED / "uncounted.json"


def requests_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["experiments"][0]["requests"]


def test_every_counted_request_brought_the_tokens_it_asked_for() -> None:
    traces = read_profile([COUNTED], counted=True)
    assert [trace.num_tokens for trace in traces] == [8] * 4 == [trace.asked for trace in traces]
    assert any((trace.tokens > 1).any() for trace in traces), "no response of several tokens was recorded"
    assert all((np.diff(trace.arrivals) > 0).all() and trace.sent < trace.arrivals[0] for trace in traces)


def test_times_and_counts_are_those_of_the_file() -> None:
    first = min(requests_of(COUNTED), key=lambda request: request["timestamp"])
    trace = read_profile([COUNTED], counted=True)[0]
    assert trace.sent == first["timestamp"]
    assert trace.arrivals.tolist() == first["response_timestamps"]
    assert trace.tokens.tolist() == [output["num_output_tokens"] for output in first["response_outputs"]]


def test_without_counts_a_request_is_taken_to_have_brought_what_it_asked_for() -> None:
    traces = read_profile([UNCOUNTED], counted=False)
    assert [trace.num_tokens for trace in traces] == [6, 6, 6]
    assert all(trace.tokens[0] == 1 for trace in traces)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        pytest.param(["abc"], [6], id="one response"),
        pytest.param(["a", "bc", "d"], [1, 2, 3], id="several"),
        pytest.param(["a", "bcd", ""], [1, 5], id="a final response without text"),
        pytest.param([], [], id="none"),
    ],
)
def test_uncounted_tokens_are_shared_out_over_the_responses_with_text(
    texts: list[str], expected: list[int], tmp_path: Path
) -> None:
    request = requests_of(UNCOUNTED)[0]
    request["response_timestamps"] = request["response_timestamps"][: len(texts)]
    request["response_outputs"] = [{"text_output": text} for text in texts]
    (trace,) = read_profile([write(tmp_path, [request])], counted=False)
    assert trace.tokens.tolist() == expected


@pytest.mark.parametrize("leftover", [0, 1, 1_515_870_885, "", None], ids=str)
def test_a_response_of_nothing_but_the_final_flag_brings_no_tokens(leftover: object, tmp_path: Path) -> None:
    request = requests_of(COUNTED)[0]
    request["response_timestamps"].append(request["response_timestamps"][-1] + 1000)
    request["response_outputs"].append({"text_output": "", "num_output_tokens": leftover})
    (trace,) = read_profile([write(tmp_path, [request])], counted=True)
    assert trace.num_tokens == 8
    assert trace.arrivals[-1] == request["response_timestamps"][-2]


def test_exports_of_processes_that_shared_the_load_are_merged_by_time() -> None:
    traces = read_profile([UNCOUNTED, COUNTED], counted=False)
    assert [trace.sent for trace in traces] == sorted(
        request["timestamp"] for file in (COUNTED, UNCOUNTED) for request in requests_of(file)
    )


@pytest.mark.parametrize("kept", [0, 1000, 4000], ids=str)
def test_an_export_that_ends_in_the_middle_is_refused(kept: int, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_bytes(COUNTED.read_bytes()[:kept])
    with pytest.raises(CutExportError):
        read_profile([COUNTED, cut], counted=True)


def test_a_piece_of_text_cut_inside_a_character_is_read(tmp_path: Path) -> None:
    torn = tmp_path / "torn.json"
    torn.write_bytes(COUNTED.read_bytes().replace(b'"text_output":"', b'"text_output":"\xe2\x82'))
    assert [trace.num_tokens for trace in read_profile([torn], counted=True)] == [8] * 4


def write(folder: Path, requests: list[dict[str, Any]]) -> Path:
    file = folder / "profile.json"
    file.write_text(json.dumps({"experiments": [{"requests": requests}]}))
    return file
