"""A Batch as bytes and back, for the other ranks: msgpack, with arrays as their memory.

Whatever dataclasses and structs a batch may hold are found by walking its annotations, so a feature's new ask needs
nothing here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from paged_backend.batch import Batch

_ARRAY, _RECORD = 1, 2  # codes of msgpack extensions


def encode_batch(batch: Batch) -> bytes:
    return msgspec.msgpack.encode(_packed(batch))


def decode_batch(encoded: bytes | bytearray | memoryview) -> Batch:
    """
    Raises:
        msgspec.DecodeError: these are no bytes of `encode_batch`.
    """
    batch = _decoder.decode(encoded)
    if not isinstance(batch, Batch):
        raise msgspec.DecodeError(f"expected a batch, got {type(batch).__name__}")
    return batch


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(
            _ARRAY, msgspec.msgpack.encode((value.dtype.str, value.shape, np.ascontiguousarray(value).data))
        )
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_packed(one) for one in value]
    if isinstance(value, dict):
        return {key: _packed(one) for key, one in value.items()}
    if type(value) in _RECORDS.values():
        fields = [_packed(getattr(value, name)) for name in _fields_of(type(value))]
        return msgspec.msgpack.Ext(_RECORD, msgspec.msgpack.encode((type(value).__name__, fields)))
    return value


def _unpacked(code: int, encoded: memoryview) -> Any:
    if code == _ARRAY:
        dtype, shape, memory = msgspec.msgpack.decode(encoded)
        return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
    name, fields = _decoder.decode(encoded)
    kind = _RECORDS[name]
    return kind(**dict(zip(_fields_of(kind), (_tuples(field) for field in fields), strict=True)))


def _tuples(value: Any) -> Any:
    """A batch has no lists: what msgpack calls an array was a tuple."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _fields_of(kind: Any) -> tuple[str, ...]:
    return (
        kind.__struct_fields__
        if issubclass(kind, msgspec.Struct)
        else tuple(field.name for field in dataclasses.fields(kind))
    )


def _records_in(annotation: Any) -> Iterator[type]:
    """The dataclasses and structs that a value of that type may hold."""
    if isinstance(annotation, type) and (
        dataclasses.is_dataclass(annotation) or issubclass(annotation, msgspec.Struct)
    ):
        yield annotation
        for inner in typing.get_type_hints(annotation).values():
            yield from _records_in(inner)
    for inner in typing.get_args(annotation):
        if not isinstance(annotation, types.GenericAlias) or inner is not Ellipsis:
            yield from _records_in(inner)


_RECORDS = {kind.__name__: kind for kind in _records_in(Batch)}
_decoder = msgspec.msgpack.Decoder(ext_hook=_unpacked)
