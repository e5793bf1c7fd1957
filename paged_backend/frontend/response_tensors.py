"""Output tensors, made once for what is said over and over: pieces of text are tokens of a vocabulary, and most numbers
are the same in every response.

To make one of a text takes 6 us in a stub of Triton Server 2.51, as long as all else that a front end does for a token
before the response is sent. A tensor can go into any number of responses: it is written into memory that the server
shares when it is first sent, and lies there as long as it lives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

_REMEMBERED = 1024  # in each sending thread: 0.2 MB of the front end's shared memory
_LONGEST_TEXT = 24  # characters; longer pieces hardly ever come again


class ResponseTensors:
    """For one thread.

    Nothing here refers back to it, so that the tensors go when it goes, and not when the garbage collector comes, which
    it may not do before the interpreter ends: a tensor that outlives the server's memory crashes the stub.
    """

    def __init__(self, make: Callable[[str, Any], Any]) -> None:
        """make: the server's, of a name and an array."""
        self._make = make
        self._text = lru_cache(_REMEMBERED)(partial(_made_text, make))
        self._number = lru_cache(_REMEMBERED)(partial(_made_number, make))

    def strings(self, name: str, texts: Sequence[str]) -> Any:
        """BYTES [len(texts)]."""
        if len(texts) == 1 and len(texts[0]) <= _LONGEST_TEXT:
            return self._text(name, texts[0])
        return self._make(name, np.array([text.encode() for text in texts], np.object_))

    def numbers(self, name: str, values: Sequence[float], dtype: Any) -> Any:
        """[len(values)]."""
        if len(values) == 1 and type(values[0]) is int:
            return self._number(name, values[0], dtype)
        return self._make(name, np.array(values, dtype))


class ThreadsTensors(threading.local):
    """Each thread that sends has its own: two must not write one tensor into shared memory at once."""

    def __init__(self, make: Callable[[str, Any], Any]) -> None:
        """make: see ResponseTensors."""
        self.own = ResponseTensors(make)


def _made_text(make: Callable[[str, Any], Any], name: str, text: str) -> Any:
    return make(name, np.array([text.encode()], np.object_))


def _made_number(make: Callable[[str, Any], Any], name: str, value: float, dtype: Any) -> Any:
    return make(name, np.array([value], dtype))
