"""Servers that say tokens which follow from a seed and the tokens before, for clients of several."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from paged_client import Delta, UnreachableError
from paged_client.async_client import AsyncStream
from paged_client.cluster.cluster_client import ClusterClient
from paged_client.cluster.resuming import SEED_STEP
from paged_client.question import Question
from paged_client.retry_policy import Limits

PROMPT = [5, 6, 7, 8]


def token_of(seed: int, token_ids: Sequence[int]) -> int:
    """The model: as the real one's, its choice follows from the seed and what is before."""
    return crc32(repr((seed, list(token_ids))).encode()) % 26


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(97 + token_id) for token_id in token_ids)


def solo(seed: int, num_tokens: int) -> list[int]:
    token_ids = list(PROMPT)
    while len(token_ids) < len(PROMPT) + num_tokens:
        token_ids.append(token_of(seed, token_ids))
    return token_ids[len(PROMPT) :]


@dataclass
class Fake:
    """A server, and its transport."""

    url: str
    dies_after: int | None = None  # tokens of an answer; it is gone from then on
    refusal: Exception | None = None
    alive: bool = True
    asked: list[Question] = field(default_factory=list)
    num_cached: int = 3

    def ask(self, question: Question, timeout: float | None = None) -> Any:
        self.asked.append(question)
        transport = type("Transport", (), {"ask": lambda _, question: Call(self, question)})()
        return AsyncStream(transport, question, Limits(timeout, None, 0))

    async def takes_requests(self) -> bool:
        return self.alive

    async def describe(self) -> dict[str, Any]:
        return {"model": await self.tell()}

    async def tell(self, *_: Any, **__: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return self.url

    tokenize = detokenize = tell

    async def close(self) -> None:
        pass


class Call:
    def __init__(self, server: Fake, question: Question) -> None:
        sampling = json.loads(str(question.tensors["sampling_parameters"]))
        self._server = server
        self._n = question.num_sequences
        self._max_tokens = sampling.get("max_tokens", 1)
        self._seeds = [(sampling.get("seed", 0) + index * SEED_STEP) % 2**64 for index in range(self._n)]
        given = list(question.tensors.get("answer_ids", ()))  # type: ignore[call-overload]
        assert not given or self._n == 1
        self._answers = [list(given) for _ in range(self._n)]
        self._stream = question.stream
        self._num_sent = 0

    async def next(self, seconds: float | None) -> tuple[dict[str, list[Any]], bool]:
        """A token of each sequence, or everything."""
        await asyncio.sleep(0)
        server = self._server
        if server.refusal is not None:
            raise server.refusal
        if not server.alive or self._num_sent == server.dies_after:
            server.alive = False
            raise UnreachableError("it is gone")
        news: list[list[int]] = [[] for _ in range(self._n)]
        for seed, answer, new in zip(self._seeds, self._answers, news, strict=True):
            while len(answer) < self._max_tokens:
                new.append(token_of(seed, [*PROMPT, *answer]))
                answer.append(new[-1])
                if self._stream:
                    break
        self._num_sent += 1
        over = len(self._answers[0]) == self._max_tokens
        outputs: dict[str, list[Any]] = {
            "text_output": [text_of(new) for new in news],
            "output_ids": [token_id for new in news for token_id in new],
            "num_output_tokens": [len(new) for new in news],
            "sequence_index": list(range(self._n)),
            "finish_reason": ["length" if over else "None"] * self._n,
            "num_input_tokens": [len(PROMPT)],
            "num_cached_tokens": [server.num_cached],
        }
        return outputs, over

    def cancel(self) -> None:
        pass


@asynccontextmanager
async def cluster(*fakes: Fake, routing: str = "least", **options: Any) -> AsyncIterator[ClusterClient]:
    by_url = {fake.url: fake for fake in fakes}
    sources = options.pop("sources", list(by_url))
    async with ClusterClient(sources, model="m", routing=routing, connect=by_url.__getitem__, **options) as client:
        yield client


async def streamed(client: ClusterClient, **sampling: Any) -> tuple[str, list[Delta]]:
    async with client.stream(PROMPT, **{"max_tokens": 12, "seed": 4, **sampling}) as stream:
        deltas = [delta async for delta in stream]
    return "".join(delta.text for delta in deltas), deltas


def two(**options: Any) -> tuple[Fake, Fake]:
    return Fake("a:1", **options), Fake("b:1")
