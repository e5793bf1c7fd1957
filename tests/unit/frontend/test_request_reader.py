"""Tensors and parameters to a Request: precedence, shapes, types, and an error that names what is wrong."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.generation_defaults import GenerationDefaults
from paged_backend.frontend.request_reader import id_parameter, read_request, wants_error_code
from paged_backend.frontend.tensor_values import MAX_JSON_BYTES
from paged_backend.request import Outputs, Request


def _tensors(**values: object) -> dict[str, np.ndarray]:
    dtypes = dict.fromkeys(("max_tokens", "top_k", "input_ids", "answer_ids"), np.int32)
    dtypes |= {"temperature": np.float32, "top_p": np.float32, "seed": np.uint64}
    tensors = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(items[0] if items else b"", bool):
            tensors[name] = np.array(items, np.bool_)
        elif name in dtypes:
            tensors[name] = np.array(items, dtypes[name])
        else:
            tensors[name] = np.array(
                [item.encode() if isinstance(item, str) else item for item in items] + [None], np.object_
            )[:-1]
    return tensors


def _read(parameters: dict[str, object] | None = None, **values: object) -> Request:
    return read_request(_tensors(**{"text_input": "hello", **values}), json.dumps(parameters or {}), 12.5)


def _refused(message: str, parameters: dict[str, object] | None = None, **values: object) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        _read(parameters, **values)
    assert caught.value.kind is ErrorKind.INVALID


def test_a_bare_prompt_gets_defaults() -> None:
    request = _read()
    assert (request.text, request.input_ids, request.stream, request.prepend_prompt, request.arrival) == (
        "hello",
        None,
        False,
        True,
        12.5,
    )
    assert request.outputs == Outputs()
    assert request.sampling.max_tokens is None


def test_token_ids_replace_the_text() -> None:
    request = read_request(_tensors(input_ids=[1, 2, 3]), "", 0.0)
    assert request.text is None and request.input_ids is not None
    assert request.input_ids.tolist() == [1, 2, 3]


def test_token_ids_are_counted_before_they_are_touched() -> None:
    """Each would be an object of Python's in `execute`, and 28 bytes."""
    many = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (2**31,), (0,), writeable=False)
    with pytest.raises(RequestError, match="input_ids: 2147483648 token ids; the most allowed is 4194304"):
        read_request({"input_ids": many}, "", 0.0)
    ids = np.array([1, 2, 3], np.int32)
    kept = read_request({"input_ids": ids}, "", 0.0).input_ids
    ids[0] = 9
    assert isinstance(kept, np.ndarray) and kept.dtype == np.int32 and kept.tolist() == [1, 2, 3]


def test_a_tensor_beats_sampling_parameters_and_they_beat_a_request_parameter() -> None:
    everywhere = {"max_tokens": 1, "temperature": 0.1, "top_k": 1}
    request = _read(everywhere, sampling_parameters=json.dumps({"max_tokens": 2, "temperature": 0.2}), max_tokens=3)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_k) == (3, 0.2, 1)


def test_null_in_sampling_parameters_means_not_given() -> None:
    assert _read({"max_tokens": 5}, sampling_parameters='{"max_tokens": null}').sampling.max_tokens == 5


def test_genai_perf_sends_numbers_as_strings() -> None:
    assert _read(sampling_parameters='{"max_tokens":"16"}').sampling.max_tokens == 16
    assert _read({"max_tokens": "16", "temperature": "0.5"}).sampling.temperature == 0.5


def test_litellm_sends_an_empty_word_for_none() -> None:
    sampling = _read(stop_words=[""], bad_words=["", "x"]).sampling
    assert (sampling.stop, sampling.bad_words) == ((), ("x",))


def test_word_tensors_have_their_sampling_parameters_names() -> None:
    sampling = _read(stop_words=["a", "b"], bad_words=["c"]).sampling
    assert (sampling.stop, sampling.bad_words) == (("a", "b"), ("c",))
    assert _read({"stop_words": "a"}).sampling.stop == ("a",)
    assert _read({"stop": "a"}).sampling.stop == ("a",)


def test_a_seed_of_64_bits_is_kept() -> None:
    assert _read(seed=2**64 - 1).sampling.seed == 2**64 - 1


@pytest.mark.parametrize("switch", Outputs.__struct_fields__)
def test_each_output_has_its_switch(switch: str) -> None:
    assert getattr(_read(**{f"return_{switch}": True}).outputs, switch)
    assert getattr(_read({f"return_{switch}": True}).outputs, switch)
    assert not getattr(_read({f"return_{switch}": True}, **{f"return_{switch}": False}).outputs, switch)


@pytest.mark.parametrize("switch", ["return_logprobs", "return_cumulative_logprob"])
def test_asking_for_logprobs_computes_them(switch: str) -> None:
    assert _read().sampling.logprobs is None
    assert _read(**{switch: True}).sampling.logprobs == 0
    assert _read(**{switch: True}, sampling_parameters='{"logprobs": 3}').sampling.logprobs == 3


def test_the_prompt_is_part_of_the_answer_unless_streamed_or_excluded() -> None:
    assert _read(exclude_input_in_output=False).prepend_prompt
    assert not _read(exclude_input_in_output=True).prepend_prompt
    assert not _read(stream=True).prepend_prompt
    assert not _read(stream=True, exclude_input_in_output=True).prepend_prompt
    _refused("exclude_input_in_output", stream=True, exclude_input_in_output=False)


def test_the_servers_own_parameters_are_no_business_of_ours() -> None:
    _read(
        {
            "priority": 3,
            "timeout": 5,
            "sequence_id": 1,
            "sequence_start": True,
            "sequence_end": False,
            "triton_enable_empty_final_response": True,
        }
    )


@pytest.mark.parametrize(
    ("parameters", "name"), [('{"id": "a"}', "a"), ('{"id": 7}', "7"), ('{"min_p": 0}', ""), ("", "")]
)
def test_a_generate_bodys_id_is_the_requests(parameters: str, name: str) -> None:
    assert id_parameter(parameters) == name


def test_the_cache_salt_is_a_request_parameter() -> None:
    assert _read({"cache_salt": "tenant"}).cache_salt == "tenant"
    _refused("cache_salt", {"cache_salt": 5})
    _refused("cache_salt", {"cache_salt": "x" * 1025})


@pytest.mark.parametrize(
    ("message", "parameters", "tensors"),
    [
        ("unknown request parameter 'max_token': did you mean 'max_tokens'", {"max_token": 5}, {}),
        ("unknown sampling parameter 'foo'", {}, {"sampling_parameters": '{"foo": 1}'}),
        ("text_input and input_ids", {}, {"input_ids": [1]}),
        (r"text_input: expected one element, got shape \[2\]", {}, {"text_input": ["a", "b"]}),
        (r"text_input: expected one element, got shape \[0\]", {}, {"text_input": []}),
        (r"max_tokens: expected one element, got shape \[2\]", {}, {"max_tokens": [1, 2]}),
        ("text_input: not valid UTF-8 at byte 2", {}, {"text_input": b"ab\xff"}),
        ("stop_words: not valid UTF-8 at byte 0", {}, {"stop_words": [b"\xff"]}),
        ("sampling_parameters: not valid JSON", {}, {"sampling_parameters": "{"}),
        ("sampling_parameters: not valid JSON", {}, {"sampling_parameters": b'{"stop": "\xff"}'}),
        (
            "sampling_parameters: not valid JSON at 'temperature': ",
            {},
            {"sampling_parameters": '{"top_k": 1, "temperature": NaN}'},
        ),
        (
            "sampling_parameters: not valid JSON at 'top_p': ",
            {},
            {"sampling_parameters": '{"top_p":-Infinity, "stop": "a"}'},
        ),
        ("sampling_parameters: expected a JSON object", {}, {"sampling_parameters": "[1]"}),
        (
            "sampling_parameters: the JSON is nested too deeply",
            {},
            {"sampling_parameters": '{"stop":' + "[" * 10_000 + "]" * 10_000 + "}"},
        ),
        (
            "sampling_parameters: .* bytes of JSON",
            {},
            {"sampling_parameters": '{"stop": "' + "x" * MAX_JSON_BYTES + '"}'},
        ),
        ("temperature: nan is not a finite number", {}, {"temperature": float("nan")}),
        ("temperature: inf is not a finite number", {}, {"temperature": float("inf")}),
        ("temperature", {}, {"temperature": -1.0}),
        ("top_p", {}, {"top_p": 0.0}),
        ("max_tokens", {}, {"max_tokens": 0}),
        ("max_tokens", {}, {"sampling_parameters": '{"max_tokens": 2147483648}'}),
        ("max_tokens", {}, {"sampling_parameters": '{"max_tokens": "many"}'}),
        ("max_tokens", {}, {"sampling_parameters": '{"max_tokens": [1]}'}),
        ("stop_words: 100000 strings; the most allowed is", {}, {"stop_words": ["x"] * 100_000}),
        ("stop: .*100000 entries", {}, {"sampling_parameters": json.dumps({"stop": ["x"] * 100_000})}),
        ("answer_ids: only with one sequence", {}, {"sampling_parameters": '{"n": 2}', "answer_ids": [5]}),
        (
            "answer_ids: only with one sequence",
            {},
            {"sampling_parameters": '{"use_beam_search": true, "beam_width": 2}', "answer_ids": [5]},
        ),
        (r"answer_ids: expected a list of integers, got shape \[1, 1\]", {}, {"answer_ids": [[5]]}),
        ("n: ", {}, {"sampling_parameters": '{"n": 65}'}),
        ("best_of: ", {}, {"sampling_parameters": '{"best_of": 3}', "stream": True}),
        ("stream: expected true or false, got 'yes'", {"stream": "yes"}, {}),
        ("stream: expected true or false, got '2'", {"stream": 2}, {}),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    message: str, parameters: dict[str, object], tensors: dict[str, object]
) -> None:
    _refused(message, parameters, **tensors)


def test_a_request_without_a_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="text_input: missing"):
        read_request({}, "", 0.0)


def test_token_ids_must_be_a_list() -> None:
    with pytest.raises(RequestError, match=r"input_ids: expected a list of integers, got shape \[1, 2\]"):
        read_request({"input_ids": np.array([[1, 2]], np.int32)}, "", 0.0)


def test_error_messages_stay_short_whatever_was_sent() -> None:
    for tensors in (
        {"sampling_parameters": json.dumps({"k" * 100_000: 1})},
        {"sampling_parameters": json.dumps({"max_tokens": "9" * 100_000})},
    ):
        with pytest.raises(RequestError) as caught:
            _read(**tensors)
        assert len(str(caught.value)) < 1000


@given(
    text=st.binary(max_size=60)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_whatever_stands_in_sampling_parameters_is_read_or_refused(text: bytes) -> None:
    with contextlib.suppress(RequestError):
        _read(sampling_parameters=text)


@given(
    members=st.dictionaries(
        st.sampled_from(["max_tokens", "temperature", "stop", "logit_bias", "seed", "stop_token_ids", "stream", "n"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_whatever_the_members_are_they_are_read_or_refused(members: dict[str, object]) -> None:
    with contextlib.suppress(RequestError):
        _read(sampling_parameters=json.dumps(members))


def test_parameters_that_are_not_utf_8_are_the_callers_mistake() -> None:
    """Found by fuzzing: they were ours."""
    with pytest.raises(RequestError, match="parameters: not valid JSON"):
        read_request({"text_input": np.array([b"a"], np.object_)}, '{"cache_salt": "\udc80"}', 0.0)
    assert not wants_error_code('{"return_error_code": "\udc80"}')


def test_a_task_that_needs_no_engine_is_read_without_its_options() -> None:
    assert _read(task="generate", stream=True).task == "generate"
    tokenize = _read({"return_error_code": True}, task="tokenize", sampling_parameters='{"add_special_tokens": false}')
    assert tokenize.sampling.add_special_tokens is False
    assert (tokenize.task, tokenize.text, tokenize.outputs.output_ids, tokenize.outputs.error_code) == (
        "tokenize",
        "hello",
        True,
        True,
    )
    assert read_request(_tensors(task="describe"), "", 0.0).task == "describe"
    ids = read_request(_tensors(task="detokenize", input_ids=[5, 6]), "", 0.0).input_ids
    assert ids is not None and ids.tolist() == [5, 6]
    _refused("text_input: task detokenize takes input_ids", task="detokenize")
    _refused("task: expected generate, embed, tokenize, detokenize, describe, got 'draw'", task="draw")
    with pytest.raises(RequestError, match="text_input: missing"):
        read_request(_tensors(task="tokenize"), "", 0.0)


def test_an_embedding_is_asked_for_with_a_task_and_its_own_keys() -> None:
    asked = _read(
        {"normalize": False},
        task="embed",
        stream=True,
        sampling_parameters='{"pooling": "mean", "dimensions": "8", "lora_name": "french"}',
    )
    sampling = asked.sampling
    assert (asked.task, asked.text, asked.stream, asked.embedding_as_text) == ("embed", "hello", False, False)
    assert (sampling.pooling, sampling.dimensions, sampling.normalize, sampling.lora_name, sampling.max_tokens) == (
        "mean",
        8,
        False,
        "french",
        1,
    )
    defaults = GenerationDefaults({"temperature": 0.6}, True)
    assert read_request(_tensors(task="embed", text_input="x"), "", 0.0, defaults).sampling.greedy, (
        "what is recommended for text is nothing to it"
    )
    for refused in ("n", "temperature", "guided_regex", "prompt_logprobs", "use_beam_search"):
        _refused(f"{refused}: not with task embed", task="embed", sampling_parameters=json.dumps({refused: 1}))
    for key, value in {"pooling": "mean", "dimensions": 8, "normalize": True}.items():
        _refused(f"{key}: only with task embed", sampling_parameters=json.dumps({key: value}))
    _refused("dimensions: expected int >= 1", task="embed", sampling_parameters='{"dimensions": 0}')
    _refused("pooling: ", task="embed", sampling_parameters='{"pooling": "max"}')


def test_the_vllm_backends_own_input_asks_for_an_embedding() -> None:
    def read(members: object) -> Request:
        return read_request(_tensors(embedding_request=json.dumps(members)), "", 0.0)

    asked = read({"input": "hello", "pooling_params": {"dimensions": [16]}})
    assert (asked.task, asked.text, asked.sampling.dimensions, asked.embedding_as_text) == ("embed", "hello", 16, True)
    ids = read({"input": [5, 6], "model": "m"}).input_ids
    assert ids is not None and ids.tolist() == [5, 6]
    for members, message in (
        ({}, "embedding_request: input: expected"),
        ({"input": ["a", "b"]}, "embedding_request: input: expected"),
        ({"input": [True]}, "embedding_request: input: expected"),
        ({"input": "a", "pooling_params": 3}, "embedding_request: pooling_params: expected a JSON object"),
        ({"input": "a", "pooling_params": {"dimensions": [0]}}, "dimensions: expected int >= 1"),
        ([], "embedding_request: expected a JSON object"),
    ):
        with pytest.raises(RequestError, match=message):
            read(members)
