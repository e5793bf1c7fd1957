"""One request on its way through several servers. A server that dies or refuses is left for another; what the caller
has been sent is never sent again.

Before the first token the request is simply asked anew. After it, the next server is given the answer's tokens so far
(`answer_ids`) and goes on behind
them: random numbers follow from the seed and the position alone, and a request that brings no seed gets one here, so
    the text is what it would have been.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import msgspec

from paged_client.answers import Answer, Delta, Usage
from paged_client.cluster.routing import Inquiry, Router, Ticket
from paged_client.cluster.servers import Server, Servers
from paged_client.cluster.tokens import PROMPT_TENSORS
from paged_client.errors import AnswerTimeoutError, UnavailableError, UnreachableError
from paged_client.merging import merged
from paged_client.question import Question

SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's sequences, as the server has it (frontend/answer.py)
_PAUSE_SECONDS = 0.1  # before servers that have all refused are asked once more
_PATIENCE_SECONDS = 30.0  # for which an answer under way waits for a server that takes it


class Tokenizer(Protocol):
    async def ids_of(self, tensors: Any, template_kwargs: Any = ...) -> list[int] | None: ...


@dataclass
class Way:
    """What the streams of one gateway share."""

    servers: Servers
    router: Router
    tokenizer: Tokenizer | None
    timeout: float | None
    num_resumed: int = 0  # answers that went on in another server
    num_asked_anew: int = 0  # requests that another server was asked, before their first token

    async def prepared(self, question: Question) -> Question:
        """With token ids in place of text, where they are known, and with a seed."""
        tensors = dict(question.tensors)
        sampling = json.loads(tensors.get("sampling_parameters", "{}"))  # type: ignore[arg-type]
        if sampling.get("seed") is None:
            sampling["seed"] = secrets.randbits(63)
        template_kwargs = sampling.pop("chat_template_kwargs", None) or {}
        ids = None if self.tokenizer is None else await self.tokenizer.ids_of(tensors, template_kwargs)
        if ids is not None:
            tensors = {name: value for name, value in tensors.items() if name not in PROMPT_TENSORS} | {
                "input_ids": ids
            }
        elif template_kwargs:
            sampling["chat_template_kwargs"] = template_kwargs
        tensors["sampling_parameters"] = json.dumps(sampling, ensure_ascii=False)
        return replace(question, tensors=tensors)


@dataclass
class _Reported:
    """What the caller has of an answer."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)  # by sequence
    finished: set[int] = field(default_factory=set)
    usage: Usage = field(default_factory=Usage)

    def take(self, delta: Delta, index: int) -> Delta:
        """The same as the caller is to see it, whatever server it came from."""
        self.token_ids.setdefault(index, []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.finished.add(index)
        num_output_tokens = self.usage.num_output_tokens + len(delta.token_ids)
        first = self.usage if num_output_tokens > len(delta.token_ids) else delta.usage
        self.usage = Usage(delta.usage.num_input_tokens, first.num_cached_tokens, num_output_tokens)
        return msgspec.structs.replace(delta, sequence_index=index, usage=self.usage)

    @property
    def begun(self) -> bool:
        return any(self.token_ids.values())


class ClusterStream:
    """An answer on its way: as AsyncStream is one."""

    def __init__(self, way: Way, question: Question, session: str) -> None:
        self._way = way
        self._question = question
        self._session = session
        self._reported = _Reported()
        self._end = None if way.timeout is None else time.monotonic() + way.timeout
        self._deltas = self._run()

    def __aiter__(self) -> ClusterStream:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def __aenter__(self) -> ClusterStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._deltas.aclose()

    async def _run(self) -> AsyncGenerator[Delta, None]:
        question = await self._way.prepared(self._question)
        async with aclosing(self._sequences(question)) as deltas:
            async for delta in deltas:
                yield delta

    async def _sequences(self, question: Question) -> AsyncGenerator[Delta, None]:
        """All sequences from one server; if that fails under way, each that is not over from a server of its own."""
        try:
            async with aclosing(self._passed_on(question, None)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        except UnavailableError:
            if question.num_sequences == 1 or not self._reported.begun:
                raise
        left = [index for index in range(question.num_sequences) if index not in self._reported.finished]
        sequences = [partial(aclosing, self._passed_on(_only(question, index), index)) for index in left]
        async with aclosing(merged(sequences, len(sequences))) as deltas:
            async for _, delta in deltas:
                yield delta

    async def _passed_on(self, question: Question, index: int | None) -> AsyncGenerator[Delta, None]:
        """A question's answer, from as many servers as it takes. index: of the only sequence; None: as the servers
        say.
        """
        tried: list[Server] = []
        waits_until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            ids = self._reported.token_ids.get(index or 0, []) if question.num_sequences == 1 else []
            ticket = await self._place(question, ids, tried)
            try:
                async with aclosing(self._from(ticket, question.going_on_from(ids))) as deltas:
                    async for delta in deltas:
                        yield self._reported.take(delta, delta.sequence_index if index is None else index)
                return
            except UnavailableError as error:
                if isinstance(error, UnreachableError):
                    await self._way.servers.lose(ticket.server, error)
                if question.num_sequences > 1 and self._reported.begun:
                    raise
                tried.append(ticket.server)
                if not self._way.servers.ready(but=tried):
                    if not self._reported.begun or time.monotonic() > waits_until:
                        raise
                    await asyncio.sleep(_PAUSE_SECONDS)
                    tried.clear()
                self._count()

    def _count(self) -> None:
        if self._reported.begun:
            self._way.num_resumed += 1
        else:
            self._way.num_asked_anew += 1

    async def _place(self, question: Question, answer_ids: Sequence[int], tried: Sequence[Server]) -> Ticket:
        """
        Raises:
            UnreachableError: no server is there.
        """
        way, waits_until = self._way, time.monotonic() + _PATIENCE_SECONDS
        while not (candidates := way.servers.ready(but=tried)):
            if not self._reported.begun or time.monotonic() > waits_until:
                raise UnreachableError("no server is ready")
            await asyncio.sleep(_PAUSE_SECONDS)
        sampling = json.loads(question.tensors["sampling_parameters"])  # type: ignore[arg-type]
        prompt: Any = question.tensors.get("input_ids")
        return await way.router.choose(
            Inquiry(
                token_ids=None if prompt is None else [*prompt, *answer_ids],
                session=self._session,
                cache_salt=str(question.parameters.get("cache_salt", "")),
                lora_name=sampling.get("lora_name"),
                max_tokens=sampling.get("max_tokens"),
            ),
            candidates,
        )

    async def _from(self, ticket: Ticket, question: Question) -> AsyncGenerator[Delta, None]:
        """What one server answers. Its place is given back, whatever happens."""
        begun = False
        try:
            async with ticket.server.connection.ask(question, self._seconds()) as stream:
                async for delta in stream:
                    if not begun:
                        begun = True
                        await ticket.begun()
                    yield delta
        finally:
            await ticket.over()

    def _seconds(self) -> float | None:
        """That the answer may still take.

        Raises:
            AnswerTimeoutError: none.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise AnswerTimeoutError(f"the answer was not complete after {self._way.timeout:g} s (timeout)")
        return left


async def whole(stream: ClusterStream) -> Answer:
    """The answer that a stream of deltas adds up to."""
    texts: dict[int, list[Delta]] = {}
    async with stream:
        async for delta in stream:
            texts.setdefault(delta.sequence_index, []).append(delta)
    usage = stream._reported.usage
    first, *others = (_answer(texts[index], usage) for index in sorted(texts)) if texts else (Answer(usage=usage),)
    return msgspec.structs.replace(first, others=tuple(others))


def _answer(deltas: Sequence[Delta], usage: Usage) -> Answer:
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=deltas[-1].finish_reason,
        usage=usage,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), ()),
    )


def _only(question: Question, index: int) -> Question:
    """One sequence of several as a question of its own."""
    tensors = dict(question.tensors)
    sampling = json.loads(tensors["sampling_parameters"])  # type: ignore[arg-type]
    sampling["n"] = 1
    sampling["seed"] = (sampling["seed"] + index * SEED_STEP) % 2**64
    tensors["sampling_parameters"] = json.dumps(sampling, ensure_ascii=False)
    return replace(question, tensors=tensors, num_sequences=1)
