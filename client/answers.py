"""What comes back: a `Delta` for every piece of a stream, an `Answer` for the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

Outputs = dict[str, Sequence[Any]]  # a response's tensors: name → values


class Usage(msgspec.Struct, frozen=True):  # as Delta made for every piece: ten times as fast as a frozen dataclass
    """Tokens of one request so far."""

    num_input_tokens: int = 0  # of the prompt
    num_cached_tokens: int = 0  # of those, found in the server's prefix cache
    num_output_tokens: int = 0  # of all its sequences


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, or might have been."""

    token_id: int
    text: str
    logprob: float
    rank: int | None = None  # in the vocabulary: 1 if no token is more likely; None: a beam search does not know it
    part: bytes | None = None  # what it spells, where that is part of a character, which `text` cannot show

    @property
    def spelling(self) -> bytes:
        """What it spells, in UTF-8."""
        return self.text.encode() if self.part is None else self.part


LogprobEntry = tuple[TokenLogprob, ...]
"""Of one position: the chosen token, then the likeliest others as far as they were asked for."""


class Delta(msgspec.Struct, frozen=True):
    """A piece of one sequence. The last one of a sequence has a finish_reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # "stop" | "length"
    usage: Usage  # up to and including this piece
    sequence_index: int = 0  # which of the request's n sequences it belongs to
    logprobs: tuple[LogprobEntry, ...] = ()  # with the sampling key logprobs: an entry for each of token_ids
    # with the sampling key prompt_logprobs, once: an entry for each token of the prompt
    prompt_logprobs: tuple[LogprobEntry | None, ...] = ()


class Answer(msgspec.Struct, frozen=True):
    """A whole answer, or what came of it before the stream was left. With n > 1 it is the first sequence, and
    `sequences` has all of them.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # None: it was left before its end
    usage: Usage = Usage()  # of the request, so the same in each of its sequences
    logprobs: tuple[LogprobEntry, ...] = ()
    others: tuple[Answer, ...] = ()
    prompt_logprobs: tuple[LogprobEntry | None, ...] = ()  # of the request: the first token has none
    embedding: tuple[float, ...] = ()  # of the prompt, if it was asked for instead of text

    @property
    def sequences(self) -> tuple[Answer, ...]:
        """In the order of their index: as many as the request's n."""
        return (self, *self.others)


_SINGLE = frozenset({"text_output", "output_ids", "finish_reason", "num_input_tokens", "num_cached_tokens"})


def deltas_of(outputs: Mapping[str, Any], num_output_tokens: int) -> tuple[Delta, ...]:
    """A response's outputs (name → list of values) as a Delta for each sequence with news; `num_output_tokens` of the
    request came before it.
    """
    texts = outputs.get("text_output", ())
    if len(texts) == 1 and _SINGLE.issuperset(outputs):  # a plain piece of a stream: nothing to be told apart
        ids, reason = tuple(outputs.get("output_ids", ())), _first(outputs, "finish_reason", "None")
        usage = Usage(
            _first(outputs, "num_input_tokens"), _first(outputs, "num_cached_tokens"), num_output_tokens + len(ids)
        )
        return (Delta(texts[0], ids, None if reason == "None" else reason, usage),)
    indices = outputs.get("sequence_index") or range(len(texts))
    ids = [int(token_id) for token_id in outputs.get("output_ids", ())]
    counts = outputs.get("num_output_tokens") or [len(ids)]
    reasons = outputs.get("finish_reason") or ["None"] * len(texts)
    logprobs = outputs.get("logprobs") or ["[]"] * len(texts)
    num_input_tokens, num_cached_tokens = _first(outputs, "num_input_tokens"), _first(outputs, "num_cached_tokens")
    deltas = []
    for text, index, count, reason, entries in zip(texts, indices, counts, reasons, logprobs, strict=True):
        mine, ids = tuple(ids[: int(count)]), ids[int(count) :]
        num_output_tokens += len(mine)
        usage = Usage(num_input_tokens, num_cached_tokens, num_output_tokens)
        deltas.append(
            Delta(
                text,
                mine,
                None if reason == "None" else reason,
                usage,
                int(index),
                _entries(entries),
                () if deltas else _prompt_entries(outputs),
            )
        )
    return tuple(deltas)


def _entries(text: str) -> tuple[LogprobEntry, ...]:
    if text == "[]":
        return ()
    return tuple(_entry(entry) for entry in json.loads(text))


def _prompt_entries(outputs: Mapping[str, Any]) -> tuple[LogprobEntry | None, ...]:
    if "prompt_logprobs" not in outputs:
        return ()
    text = next(iter(outputs["prompt_logprobs"]), "[]")
    return tuple(None if entry is None else _entry(entry) for entry in json.loads(text))


def _entry(said: Mapping[str, Any]) -> LogprobEntry:
    return tuple(_token(int(token_id), token) for token_id, token in said.items())


def _token(token_id: int, said: Mapping[str, Any]) -> TokenLogprob:
    part = said.get("bytes")
    return TokenLogprob(
        token_id, said["decoded_token"], said["logprob"], said.get("rank"), None if part is None else bytes(part)
    )


def _first(outputs: Mapping[str, Any], name: str, default: Any = 0) -> Any:
    values = outputs.get(name)
    return values[0] if values else default
