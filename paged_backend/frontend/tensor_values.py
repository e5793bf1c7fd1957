"""One value out of a caller's tensors and parameters: a switch, a text, a JSON object, a list of strings.

All raise RequestError, which names the tensor, key or parameter and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from paged_backend.errors import RequestError
from paged_backend.request import MAX_BAD_WORDS, MAX_STOP_STRINGS

MAX_JSON_BYTES = 1_048_576
MAX_WORDS = max(MAX_STOP_STRINGS, MAX_BAD_WORDS)

Tensor = NDArray[Any]
Tensors = Mapping[str, Tensor]


def read_json(name: str, text: bytes) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise RequestError(f"{name}: {len(text)} bytes of JSON; the most allowed is {MAX_JSON_BYTES}")
    try:
        members = msgspec.json.decode(text)
    except RecursionError:
        raise RequestError(f"{name}: the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{name}: not valid JSON{_key_before(text, str(error))}: {error}") from None
    if not isinstance(members, dict):
        raise RequestError(f"{name}: expected a JSON object")
    return members


def _key_before(text: bytes, error: str) -> str:
    """Whose value it is that cannot be read: NaN and Infinity, which some programs write, are no JSON."""
    place = re.search(r"\(byte (\d+)\)", error)
    before = b"" if place is None else text[: int(place[1])][-200:]
    found = re.search(rb'"(\w{1,80})"\s*:\s*-?$', before)
    return f" at '{found[1].decode(errors='replace')}'" if found else ""


def read_switch(tensors: Tensors, given: Mapping[str, Any], name: str) -> bool | None:
    """A boolean; None if not given."""
    if name in tensors:
        value = only_element(name, tensors[name])
    elif name in given:
        value = given[name]
    else:
        return None
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise RequestError(f"{name}: expected true or false, got {str(value)[:80]!r}")


def read_words(name: str, tensor: Tensor) -> list[str]:
    """Empty strings mean nothing: LiteLLM sends [""] for none."""
    if tensor.size > MAX_WORDS:
        raise RequestError(f"{name}: {tensor.size} strings; the most allowed is {MAX_WORDS}")
    return [word for word in (as_string(name, item) for item in tensor.ravel().tolist()) if word]


def only_element(name: str, tensor: Tensor) -> Any:
    """The one element of a tensor of shape [1], or [1, 1] as some clients send."""
    if tensor.size != 1:
        raise RequestError(f"{name}: expected one element, got shape {list(tensor.shape)}")
    return tensor.ravel()[0] if tensor.dtype == np.object_ else tensor.ravel()[0].item()


def as_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if not isinstance(value, bytes):
        raise RequestError(f"{name}: expected a string")
    return value


def as_string(name: str, value: Any) -> str:
    try:
        return as_bytes(name, value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not valid UTF-8 at byte {error.start}") from None


def text_element(name: str, tensor: Tensor) -> str:
    """The text in a tensor of one BYTES element."""
    return as_string(name, only_element(name, tensor))


def json_element(name: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON object in a tensor of one BYTES element."""
    return read_json(name, as_bytes(name, only_element(name, tensor)))
