"""What `paged generate` and `paged chat` share: options, the line on speed, and one sentence on failure."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn

import typer

from paged_client.answers import Delta, Usage
from paged_client.client import DEFAULT_MODEL, DEFAULT_URL
from paged_client.errors import PagedError

INTERRUPTED_EXIT = 130
_MEASURABLE_SECONDS = 0.1  # of a short answer several tokens may come in one piece: no speed follows from that
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_Url = Annotated[
    str,
    typer.Option(
        "--url",
        "-u",
        metavar="URL",
        help="HOST:PORT of the server's gRPC service, or http://HOST:PORT of its HTTP service.",
    ),
]
_MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", metavar="N", min=1, help="Longest answer in tokens; without it the server's default."
    ),
]
_Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", metavar="T", min=0, help="0: always the likeliest token.")
]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling",
        "-s",
        metavar="KEY=VALUE",
        help="Any other sampling key of the model, such as top_p=0.9 or stop='[\"\\n\"]'; repeatable.",
    ),
]


@dataclass(frozen=True)
class ServerOptions:
    """Which server is asked, and which of its models."""

    url: _Url = DEFAULT_URL
    model_name: Annotated[
        str, typer.Option("--model-name", metavar="NAME", help="What the server calls the model.")
    ] = DEFAULT_MODEL


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling keys that have an option of their own; None: not given."""

    max_tokens: _MaxTokens = None
    temperature: _Temperature = None
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same answer.")] = None


def sampling_of(named: SamplingOptions, options: list[str] | None) -> dict[str, Any]:
    """Sampling keys for a request: `named` ones that are given, and KEY=VALUE texts whose values are JSON or else
    strings.

    Raises:
        typer.BadParameter: not of the form KEY=VALUE, or a key given twice.
    """
    sampling = {key: value for key, value in asdict(named).items() if value is not None}
    for option in options or []:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"'{option}' is not of the form KEY=VALUE", param_hint="--sampling")
        if key in sampling:
            raise typer.BadParameter(f"'{key}' is given twice", param_hint="--sampling")
        try:
            sampling[key] = json.loads(text)
        except ValueError:
            sampling[key] = text
    return sampling


def printable(text: str) -> str:
    """Without the control characters that would steer a terminal: what a model says is not to be trusted with that."""
    return text.translate(_CONTROLS)


class Speed:
    """How fast an answer came, as seen from here."""

    def __init__(self) -> None:
        self._started = self._first = self._last = time.monotonic()
        self._num_first = 0
        self.usage = Usage()

    def take(self, delta: Delta) -> None:
        self._last = time.monotonic()
        if not self.usage.num_output_tokens:
            self._first, self._num_first = self._last, delta.usage.num_output_tokens
        self.usage = delta.usage

    def line(self) -> str:
        """Tokens of prompt and answer, the time to the first and the speed after it."""
        cached = f" ({self.usage.num_cached_tokens} cached)" if self.usage.num_cached_tokens else ""
        return f"prompt {self.usage.num_input_tokens} tokens{cached}, answer {self.answer()}"

    def answer(self) -> str:
        """The same of the answer alone."""
        num_tokens, (num_later, seconds) = self.usage.num_output_tokens, self.later
        first = f": the first after {1000 * (self._first - self._started):.0f} ms" if num_tokens else ""
        timed = num_later and seconds >= _MEASURABLE_SECONDS
        return f"{num_tokens} tokens{first}" + (f", then {num_later / seconds:.0f} tokens/s" if timed else "")

    @property
    def later(self) -> tuple[int, float]:
        """Tokens after the first piece, and the seconds that they took."""
        return self.usage.num_output_tokens - self._num_first, self._last - self._first


def _complain(reason: str) -> NoReturn:
    print(f"paged: error: {printable(reason)}", file=sys.stderr)
    raise typer.Exit(1) from None


@contextmanager
def one_sentence_on_failure() -> Iterator[None]:
    try:
        yield
    except (PagedError, ValueError) as error:
        sys.stdout.flush()
        _complain(str(error))
    except (
        OSError
    ) as error:  # of standard output: a full disk; a pipe that nobody reads any more is the library's to handle
        if error.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written has no place to go
        _complain(f"standard output: {error.strerror}")
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED_EXIT) from None
