"""What our server says → OpenAI's JSON: whole answers, and the chunks of a stream."""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from paged_client.answers import Answer, Delta, LogprobEntry, TokenLogprob, Usage
from paged_client.openai.translation import Asked

_LEAST_LOGPROB = -9999.0


class _Reply:
    """One request's answer. A choice's index counts through the prompts: prompt * num_choices + sequence."""

    whole_kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, model: str, asked: Asked, request_id: str | None = None) -> None:
        """request_id: what the answer's id ends with; None: something random."""
        self._asked = asked
        self._head = {
            "id": self.id_prefix + (request_id or secrets.token_hex(12)),
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """answers: one for each prompt."""
        choices = [
            self._choice(self._index(prompt, number), prompt, sequence)
            for prompt, answer in enumerate(answers)
            for number, sequence in enumerate(answer.sequences)
        ]
        return {
            **self._head,
            "object": self.whole_kind,
            "choices": choices,
            "usage": self.usage(answer.usage for answer in answers),
        }

    def chunks(self, prompt: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a stream says of a piece of an answer to the prompt of that number; nothing, if it has neither text nor
        log-probabilities nor an end.
        """
        index = self._index(prompt, delta.sequence_index)
        if index not in self._begun:
            self._begun.add(index)
            for choice in self._opening(index, prompt, delta):
                yield self._chunk([choice])
        if delta.text or delta.logprobs or delta.finish_reason:
            yield self._chunk([self._piece(index, delta)])

    def usage_chunk(self, usages: Iterable[Usage]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": self.usage(usages)}

    def usage(self, usages: Iterable[Usage]) -> dict[str, Any]:
        """usages: of each prompt so far."""
        return usage_of(usages)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _index(self, prompt: int, sequence: int) -> int:
        return prompt * self._asked.num_choices + sequence

    def _choice(self, index: int, prompt: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _opening(self, index: int, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError


class CompletionReply(_Reply):
    whole_kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, model: str, asked: Asked, request_id: str | None = None) -> None:
        super().__init__(model, asked, request_id)
        self._prompts: dict[int, Sequence[LogprobEntry | None]] = {}  # their log-probabilities, which come once
        self._lengths: dict[int, int] = defaultdict(int)  # characters that each choice's tokens have so far
        self._decoders: dict[int, codecs.IncrementalDecoder] = defaultdict(
            partial(codecs.getincrementaldecoder("utf-8"), "replace")
        )

    def _choice(self, index: int, prompt: int, answer: Answer) -> dict[str, Any]:
        echoed = "".join(self._asked.echoed[prompt : prompt + 1])
        wants = not self._asked.prompt_only
        known = self._prompt_entries(prompt, answer.prompt_logprobs)
        return {
            "index": index,
            "text": echoed + (answer.text if wants else ""),
            "logprobs": self._logprobs(index, known, answer.logprobs if wants else ()),
            "finish_reason": answer.finish_reason,
        }

    def _opening(self, index: int, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        known = self._prompt_entries(prompt, delta.prompt_logprobs or self._prompts.get(prompt, ()))
        self._prompts.setdefault(prompt, delta.prompt_logprobs)
        logprobs = self._logprobs(index, known, ()) if known else None
        return [
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
            for text in self._asked.echoed[prompt : prompt + 1]
        ]

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        if self._asked.prompt_only:
            return {"index": index, "text": "", "logprobs": None, "finish_reason": delta.finish_reason}
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, (), delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def usage(self, usages: Iterable[Usage]) -> dict[str, Any]:
        return super().usage(
            msgspec.structs.replace(usage, num_output_tokens=0) if self._asked.prompt_only else usage
            for usage in usages
        )

    def _prompt_entries(self, prompt: int, entries: Sequence[LogprobEntry | None]) -> list[LogprobEntry]:
        """Of an echoed prompt; its first token has no log-probability."""
        if not self._asked.first_tokens:
            return []
        first = (TokenLogprob(-1, self._asked.first_tokens[prompt], math.nan),)
        return [entry or first for entry in entries]

    def _logprobs(
        self, index: int, prompt: Sequence[LogprobEntry], entries: Sequence[LogprobEntry]
    ) -> dict[str, Any] | None:
        wanted = self._asked.sampling.get("logprobs")
        if wanted is None:
            return None
        offsets, entries = [], [*prompt, *entries]
        for entry in entries:
            offsets.append(self._lengths[index])
            # a character counts where its last byte is
            self._lengths[index] += len(self._decoders[index].decode(entry[0].spelling))
        return {
            "tokens": [_name(entry[0]) for entry in entries],
            "token_logprobs": [
                None if math.isnan(entry[0].logprob) else _finite(entry[0].logprob) for entry in entries
            ],
            "top_logprobs": [None if math.isnan(entry[0].logprob) else _by_text(entry) for entry in entries]
            if wanted
            else None,
            "text_offset": offsets,
        }


class ChatReply(_Reply):
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def _choice(self, index: int, prompt: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def _opening(self, index: int, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ]

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        said = {"content": delta.text} if delta.text or delta.logprobs else {}
        return {
            "index": index,
            "delta": said,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
        wanted = self._asked.sampling.get("logprobs")
        if wanted is None:
            return None
        return {
            "content": [_chat_token(entry[0]) | {"top_logprobs": _likeliest(entry, wanted)} for entry in entries],
            "refusal": None,
        }


def _likeliest(entry: LogprobEntry, count: int) -> list[dict[str, Any]]:
    """The chosen token is among them only if it is one of the likeliest."""
    return [_chat_token(token) for token in sorted(entry, key=lambda token: -token.logprob)[:count]]


def _by_text(entry: LogprobEntry) -> dict[str, float]:
    """Tokens may be spelled alike: the chosen one goes before the others, the likelier before the less likely."""
    found: dict[str, float] = {}
    for token in entry:
        found.setdefault(_name(token), _finite(token.logprob))
    return found


def _finite(logprob: float) -> float:
    """JSON has no infinity; vLLM says the same for it."""
    return max(logprob, _LEAST_LOGPROB)


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    name = token.text if token.part is None else _escaped(token.part)
    return {"token": name, "logprob": _finite(token.logprob), "bytes": list(token.spelling)}


def _name(token: TokenLogprob) -> str:
    """As OpenAI names it in completions: "bytes:\\xf0\\x9f" for a part of a character."""
    return token.text if token.part is None else f"bytes:{_escaped(token.part)}"


def _escaped(part: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in part)


def usage_of(usages: Iterable[Usage]) -> dict[str, Any]:
    """Of all prompts together; a prompt counts once, however many choices it has."""
    counted = list(usages)
    num_input_tokens = sum(usage.num_input_tokens for usage in counted)
    num_output_tokens = sum(usage.num_output_tokens for usage in counted)
    return {
        "prompt_tokens": num_input_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_input_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.num_cached_tokens for usage in counted)},
    }
