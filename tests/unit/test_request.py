from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_backend.errors import RequestError
from paged_backend.request import SamplingParams, parse_sampling


def test_numbers_may_be_strings_and_one_stop_string_may_stand_alone() -> None:
    parsed = parse_sampling(
        {
            "max_tokens": "16",
            "temperature": "0.5",
            "top_k": 5,
            "stop": "end",
            "logit_bias": {"7": "-3"},
            "ignore_eos": "true",
        }
    )
    assert parsed == SamplingParams(
        max_tokens=16, temperature=0.5, top_k=5, stop=("end",), logit_bias={7: -3.0}, ignore_eos=True
    )


def test_none_means_default() -> None:
    assert parse_sampling({"max_tokens": None, "stop": None, "seed": None}) == SamplingParams()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "temperature: expected float >= 0.0, got -1"),
        ({"temperature": "nan"}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: inf is not a finite number"),
        ({"max_tokens": 0}, "max_tokens: expected int >= 1, got 0"),
        ({"max_tokens": 2**31}, "max_tokens: expected int <= 2147483647, got 2147483648"),
        ({"max_tokens": 1.5}, "max_tokens: "),
        ({"max_tokens": 10**400}, "max_tokens: "),
        ({"top_p": 0}, "top_p: expected float > 0.0"),
        ({"top_k": -2}, "top_k: expected int >= -1, got -2"),
        ({"stop": ["x"] * 65}, "stop: expected array of length <= 64, got 65 entries"),
        ({"stop": [""]}, "stop: "),
        ({"logit_bias": {"1": 2, "x": 1}}, "logit_bias: expected int, got str, got {'x': 1}"),
        ({"logit_bias": {"1": 2, "2": 200, "3": 300}}, "logit_bias: expected float <= 100.0, got {'2': 200}"),
        ({"stop": ["a", "x" * 2000]}, "stop: expected str of length <= 1024, got 'xxx"),
        ({"stop_token_ids": [1, -2]}, "stop_token_ids: expected int >= 0, got -2 as entry 1"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs: expected str, got int, got 1 entries"),
        ({"seed": 2**64}, "seed: expected 64 bits"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: 9 is more than max_tokens (8)"),
        ({"n": 65}, "n: expected int <= 64, got 65"),
        ({"n": 2, "temperature": 0}, "n: 2 with temperature 0: every sequence would be the same"),
        ({"n": 3, "best_of": 2}, "best_of: 2 is less than n (3)"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens: expected at least 1 token"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens: expected int >= -1, got -2"),
        ({"stop": ["x"], "detokenize": False}, "stop and detokenize: "),
        ({"priority_level": "high"}, "priority_level: "),
        ({"request_deadline_seconds": 0}, "request_deadline_seconds: expected float > 0.0"),
        ({"request_deadline_seconds": "inf"}, "request_deadline_seconds: inf is not a finite number"),
        ({"stop": ["x" * 1024] * 9}, "stop: 9216 characters together; the most allowed is 8192"),
        ({"temprature": 1}, "unknown sampling parameter 'temprature'"),
        ({"x" * 10_000: 1}, "unknown sampling parameter 'xxx"),
    ],
)
def test_a_wrong_value_is_refused_with_key_limit_and_value(options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_sampling(options)
    assert str(caught.value).startswith(said)
    assert len(str(caught.value)) < 1000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__) | st.text(max_size=5), JSON, max_size=4))
def test_anything_at_all_is_parsed_or_refused_with_a_request_error(options: dict[str, object]) -> None:
    try:
        parsed = parse_sampling(options)
    except RequestError:
        return
    assert 0 <= parsed.temperature <= 100 and 0 < parsed.top_p <= 1 and parsed.n == 1


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a\0b", "a\nb", "x" * 129])
def test_a_lora_name_is_a_plain_name_of_a_folder(name: str) -> None:
    with pytest.raises(RequestError, match="^lora_name: "):
        parse_sampling({"lora_name": name})
    assert parse_sampling({"lora_name": "français 2-a_b.v1@x"}).lora_name == "français 2-a_b.v1@x"
