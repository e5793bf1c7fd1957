"""What a benchmark sends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paged_backend.errors import EngineError
from paged_client.bench.workload import Span, Workload, as_text, make_requests, write_input_data

FIXED = Workload(Span(12, 12), Span(5, 5))


@pytest.mark.parametrize(
    ("text", "span"), [("128", Span(128, 128)), ("32:512", Span(32, 512)), ("7:7", Span(7, 7))], ids=str
)
def test_lengths_are_read(text: str, span: Span) -> None:
    assert Span.parse("--input-tokens", text) == span


@pytest.mark.parametrize("text", ["0", "-1", "9:3", "0:5", "x", "1:", "", "1.5", "1:2:3"])
def test_a_wrong_length_is_refused_by_option_and_value(text: str) -> None:
    with pytest.raises(EngineError, match=f"--output-tokens {text}: expected"):
        Span.parse("--output-tokens", text)


def test_fixed_lengths_are_exact() -> None:
    assert {(len(request.prompt), request.answer) for request in make_requests(FIXED, 50)} == {(12, 5)}


def test_uniform_lengths_fill_their_range_and_stay_in_it() -> None:
    requests = make_requests(Workload(Span(10, 20), Span(1, 4)), 500)
    assert {len(request.prompt) for request in requests} == set(range(10, 21))
    assert {request.answer for request in requests} == {1, 2, 3, 4}


def test_sharegpt_like_lengths_have_the_means_of_the_paper_and_keep_the_limit() -> None:
    requests = make_requests(Workload(None, None, longest=100_000), 20_000)
    assert np.mean([len(request.prompt) for request in requests]) == pytest.approx(161, rel=0.05)
    assert np.mean([request.answer for request in requests]) == pytest.approx(338, rel=0.05)
    cut = make_requests(Workload(None, None, longest=512), 2000)
    assert max(len(request.prompt) + request.answer for request in cut) <= 512
    assert min(min(len(request.prompt), request.answer) for request in cut) >= 1


def test_the_seed_decides_lengths_and_the_nonce_tokens() -> None:
    workload = Workload(None, None, seed=3, nonce=1)
    requests, again = make_requests(workload, 20), make_requests(workload, 20)
    assert all(
        np.array_equal(a.prompt, b.prompt) and a.answer == b.answer for a, b in zip(requests, again, strict=True)
    )
    others = make_requests(Workload(None, None, seed=3, nonce=2), 20)
    assert [(len(a.prompt), a.answer) for a in requests] == [(len(b.prompt), b.answer) for b in others]
    assert not any(
        np.array_equal(a.prompt, b.prompt) for a, b in zip(requests, others, strict=True) if len(a.prompt) > 3
    )


def test_no_two_prompts_of_any_round_begin_alike() -> None:
    begun = [tuple(request.prompt[:8]) for number in range(4) for request in make_requests(FIXED, 100, number)]
    assert len(set(begun)) == 400


def test_shared_prefixes_are_shared_in_turn_and_in_every_round() -> None:
    workload = Workload(Span(4, 4), Span(1, 1), shared_prefix=16, num_prefixes=3)
    for number in (0, 1):
        requests = make_requests(workload, 9, number)
        assert {len(request.prompt) for request in requests} == {20}
        prefixes = [tuple(request.prompt[:16]) for request in requests]
        assert len(set(prefixes)) == 3
        assert prefixes[:3] * 3 == prefixes
        assert len({tuple(request.prompt[16:]) for request in requests}) == 9
    assert tuple(make_requests(workload, 1, 0)[0].prompt[:16]) == tuple(make_requests(workload, 1, 1)[0].prompt[:16])


def test_input_data_asks_for_exact_tokens_by_id(tmp_path: Path) -> None:
    requests, file = make_requests(FIXED, 3), tmp_path / "input.json"
    write_input_data(file, FIXED, requests, as_ids=True, tokens_per_word=1, count_tokens=True)
    steps = json.loads(file.read_text())["data"]
    assert [step["input_ids"] for step in steps] == [
        {"content": request.prompt.tolist(), "shape": [12]} for request in requests
    ]
    assert all(step["return_num_output_tokens"] == [True] and step["stream"] == [True] for step in steps)
    assert json.loads(steps[0]["sampling_parameters"][0]) == {"max_tokens": 5, "ignore_eos": True, "temperature": 0.0}


def test_input_data_for_the_vllm_backends_tensors_is_text_and_asks_for_nothing_unknown(tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    write_input_data(file, FIXED, make_requests(FIXED, 2), as_ids=False, tokens_per_word=1, count_tokens=False)
    steps = json.loads(file.read_text())["data"]
    assert {frozenset(step) for step in steps} == {frozenset({"text_input", "stream", "sampling_parameters"})}
    assert len(steps[0]["text_input"][0].split()) == 12


def test_text_has_as_many_words_as_make_the_tokens() -> None:
    prompt = np.arange(100, 400)
    assert len(as_text(prompt, 1.5).split()) == 200
    assert len(as_text(prompt, 0.5).split()) == 600
    assert as_text(prompt, 1.0).split()[:100] == as_text(prompt[:100], 1.0).split()


def test_the_longest_request_bounds_all() -> None:
    for workload in (FIXED, Workload(Span(1, 9), Span(1, 30), shared_prefix=5), Workload(None, None, longest=300)):
        longest = workload.longest_request
        assert all(
            len(request.prompt) <= longest[0] and request.answer <= longest[1]
            for request in make_requests(workload, 300)
        )
