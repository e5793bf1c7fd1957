"""A batch reaches the other ranks as it was, whatever features ask in it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest

from paged_backend.batch import Ask, Batch, Drafts, NewRow, PromptScoring, PromptSpan, TokenEdit, TokenMasks
from paged_backend.request import SamplingParams
from paged_backend.runner.parallel.batch_codec import decode_batch, encode_batch
from paged_backend.runner.warm_up import largest_batches, warm_up_batches


def sample_of(annotation: Any) -> Any:
    """Some value of that type."""
    parts = get_args(annotation)
    if is_dataclass(annotation):
        return annotation(**{name: sample_of(hint) for name, hint in get_type_hints(annotation).items()})
    if get_origin(annotation) is np.ndarray:
        return np.arange(4, dtype=get_args(parts[1])[0]).reshape(2, 2)
    if get_origin(annotation) is tuple:
        return tuple(sample_of(part) for part in (parts[:1] * 2 if parts[1:] == (Ellipsis,) else parts))
    if parts:  # a union
        return sample_of(parts[0])
    return None if annotation is Any else annotation(3)


def same(one: Any, other: Any) -> bool:
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bool((one == other).all())
        )
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", get_args(Ask))
def test_every_kind_of_ask_comes_back(kind: type) -> None:
    batch = replace(next(iter(warm_up_batches(64, 8, 100, 16, 40, 199))), asks=(sample_of(kind),))
    assert same(batch, decode_batch(encode_batch(batch)))


def test_a_batch_with_everything_comes_back() -> None:
    sampling = SamplingParams(
        temperature=0.5, logit_bias={5: -1.5, 9: 2.0}, stop=("a", "b"), stop_token_ids=(1, 2), guided_choice=("x", "y")
    )
    new = NewRow(3, np.arange(5, dtype=np.int32), 4, sampling, 2**64 - 1, (1, 2), ((1, 2), (3,)), 5)
    ints = np.array([[1, 2, 3]], np.int32)
    batch = Batch(
        step=7,
        rows=np.array([3, 1], np.int32),
        starts=np.array([0, 4], np.int32),
        counts=np.array([5, 1], np.int32),
        samples=np.array([True, False]),
        request_ids=np.array([2**62, 1], np.int64),
        new_rows=(new, replace(new, features=0, row=int(np.int32(1)))),
        page_updates=ints,
        features=3,
        asks=(
            TokenMasks(
                np.array([3], np.int32),
                np.array([[7, -1]], np.int32),
                np.array([[3, 1]], np.int32),
                np.array([[5, 2]], np.int32),
            ),
            PromptScoring((PromptSpan(2**40 + 1, 0, 3, 4, 2),)),
        ),
        token_edits=(TokenEdit(1, 2, np.array([9], np.int32)),),
        page_copies=np.array([[1, 2]], np.int32),
        drafts=Drafts(
            np.array([1, 0], np.int32), np.array([0, 2], np.int32), (TokenEdit(3, 5, np.array([8], np.int32)),)
        ),
    )
    assert same(batch, decode_batch(encode_batch(batch)))


def test_batches_of_a_warm_up_come_back() -> None:
    batches = [*warm_up_batches(64, 8, 100, 16, 40, 199), *largest_batches(64, 8, 100, 199, adapters=False)]
    assert len(batches) > 10
    assert all(same(batch, decode_batch(encode_batch(batch))) for batch in batches)


def test_a_plain_step_is_small() -> None:
    """A decode step of 256 sequences is 17 bytes a sequence and some names."""
    rows = np.arange(256, dtype=np.int32)
    batch = Batch(1, rows, rows, np.ones_like(rows), np.ones(256, np.bool_), rows.astype(np.int64))
    assert 256 * (3 * 4 + 8 + 1) < len(encode_batch(batch)) < 256 * (3 * 4 + 8 + 1) + 400


def test_other_bytes_are_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_batch(msgspec.msgpack.encode([1, 2]))
    with pytest.raises(msgspec.DecodeError):
        decode_batch(encode_batch(next(iter(warm_up_batches(64, 8, 100, 16, 40, 199))))[:-3])
