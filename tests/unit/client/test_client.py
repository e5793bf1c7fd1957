"""The client library without a server: what is asked, what is tried again, when patience ends, how errors are told
apart.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from paged_client import (
    Answer,
    AnswerTimeoutError,
    AsyncStream,
    InvalidRequestError,
    PagedError,
    RequestCancelledError,
    ServerError,
    Stream,
    TokenLogprob,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
    Usage,
)
from paged_client.question import Question, question_of
from paged_client.retry_policy import Limits, within

QUESTION = question_of("hello", {}, stream=True)
FAST = Limits(timeout=5.0)


def piece(text: str, token_id: int, finish: str = "None") -> tuple[dict[str, list[Any]], bool]:
    outputs = {
        "text_output": [text],
        "output_ids": [token_id],
        "finish_reason": [finish],
        "num_input_tokens": [5],
        "num_cached_tokens": [4],
    }
    return outputs, finish != "None"


WHOLE = [piece("a", 1), piece("", 2), piece("b", 3, "length")]


class Script:
    """A transport whose calls bring what the script says: one list of pieces and exceptions a call."""

    def __init__(self, *calls: list[Any]) -> None:
        self.calls = list(calls)
        self.num_asked = 0
        self.num_left = 0

    def ask(self, question: Question) -> ScriptedCall:
        self.num_asked += 1
        return ScriptedCall(self, self.calls.pop(0))

    def close(self) -> None:
        pass


class ScriptedCall:
    def __init__(self, script: Script, events: list[Any]) -> None:
        self._script = script
        self._events = list(events)

    def next(self, seconds: float | None) -> tuple[dict[str, list[Any]], bool]:
        event = self._events.pop(0) if self._events else TimeoutError()
        if isinstance(event, TimeoutError) and seconds is not None:
            time.sleep(seconds)
        if isinstance(event, BaseException):
            raise event
        return event

    def close(self) -> None:
        self._script.num_left += 1


class AsyncScript(Script):
    def ask(self, question: Question) -> AsyncScriptedCall:  # type: ignore[override]
        return AsyncScriptedCall(super().ask(question))


class AsyncScriptedCall:
    def __init__(self, call: ScriptedCall) -> None:
        self._call = call

    async def next(self, seconds: float | None) -> tuple[dict[str, list[Any]], bool]:
        await asyncio.sleep(0)
        return self._call.next(seconds)

    def cancel(self) -> None:
        self._call.close()


def gathered(script: Script, limits: Limits) -> Answer:
    stream = Stream(script, QUESTION, limits)
    for _ in stream:
        pass
    return stream.answer


def gathered_async(script: Script, limits: Limits) -> Answer:
    async def gather() -> Answer:
        stream = AsyncStream(script, QUESTION, limits)  # type: ignore[arg-type]
        async for _ in stream:
            pass
        return stream.answer

    return asyncio.run(gather())


Gather = Callable[[Script, Limits], Answer]
both = pytest.mark.parametrize(
    ("kind", "gather"), [(Script, gathered), (AsyncScript, gathered_async)], ids=["sync", "async"]
)


@both
def test_an_answer_is_the_sum_of_its_deltas(kind: type[Script], gather: Gather) -> None:
    assert gather(kind(WHOLE), FAST) == Answer("ab", (1, 2, 3), "length", Usage(5, 4, 3))


@both
def test_a_final_response_that_holds_nothing_ends_the_stream(kind: type[Script], gather: Gather) -> None:
    assert gather(kind([piece("a", 1), ({}, True)]), FAST).text == "a"


def logprob_entry(token_id: int, logprob: float) -> dict[str, Any]:
    return {str(token_id): {"logprob": logprob, "rank": 1, "decoded_token": f"t{token_id}"}}


SEVERAL = [
    (
        {
            "text_output": ["b"],
            "sequence_index": [1],
            "num_output_tokens": [1],
            "output_ids": [21],
            "finish_reason": ["None"],
            "num_input_tokens": [5],
        },
        False,
    ),
    (
        {
            "text_output": ["a", "d"],
            "sequence_index": [0, 1],
            "num_output_tokens": [2, 1],
            "output_ids": [11, 12, 22],
            "finish_reason": ["None", "stop"],
            "num_input_tokens": [5],
            "prompt_logprobs": [json.dumps([None, logprob_entry(5, -3.0)])],
            "logprobs": [
                json.dumps([logprob_entry(11, -0.5), logprob_entry(12, -1.0)]),
                json.dumps([logprob_entry(22, -2.0)]),
            ],
        },
        False,
    ),
    (
        {
            "text_output": ["c"],
            "sequence_index": [0],
            "num_output_tokens": [0],
            "output_ids": [],
            "finish_reason": ["length"],
            "num_input_tokens": [5],
        },
        True,
    ),
]


@both
def test_pieces_of_several_sequences_are_kept_apart(kind: type[Script], gather: Gather) -> None:
    answer = gather(kind(SEVERAL), FAST)
    assert [(one.text, one.token_ids, one.finish_reason) for one in answer.sequences] == [
        ("ac", (11, 12), "length"),
        ("bd", (21, 22), "stop"),
    ]
    assert answer.usage == answer.others[0].usage == Usage(5, 0, 4)
    assert answer.prompt_logprobs == (None, (TokenLogprob(5, "t5", -3.0, 1),))
    assert answer.logprobs == ((TokenLogprob(11, "t11", -0.5, 1),), (TokenLogprob(12, "t12", -1.0, 1),))


def test_every_piece_names_its_sequence_and_counts_the_requests_tokens() -> None:
    deltas = list(Stream(Script(SEVERAL), QUESTION, FAST))
    assert [(delta.sequence_index, delta.text, delta.usage.num_output_tokens) for delta in deltas] == [
        (1, "b", 1),
        (0, "a", 3),
        (1, "d", 4),
        (0, "c", 4),
    ]


def test_closing_forgets_pieces_that_have_arrived_already() -> None:
    stream = Stream(Script(SEVERAL), QUESTION, FAST)
    assert [next(stream).text, next(stream).text] == ["b", "a"]
    stream.close()
    assert list(stream) == []


@both
def test_unavailable_before_the_first_token_is_tried_again(kind: type[Script], gather: Gather) -> None:
    script = kind([UnavailableError("full")], [UnreachableError("gone")], WHOLE)
    assert gather(script, FAST).text == "ab"
    assert (script.num_asked, script.num_left) == (3, 3)


@both
def test_after_the_first_token_nothing_is_tried_again(kind: type[Script], gather: Gather) -> None:
    script = kind([piece("a", 1), UnavailableError("gone")], WHOLE)
    with pytest.raises(UnavailableError, match="gone"):
        gather(script, FAST)
    assert (script.num_asked, script.num_left) == (1, 1)


@both
@pytest.mark.parametrize(
    "error",
    [InvalidRequestError("x"), ServerError("x"), RequestCancelledError("x"), UnknownModelError("x")],
    ids=lambda e: type(e).__name__,
)
def test_only_unavailable_is_tried_again(kind: type[Script], gather: Gather, error: PagedError) -> None:
    script = kind([error], WHOLE)
    with pytest.raises(type(error)):
        gather(script, FAST)
    assert script.num_asked == 1


@both
def test_retries_end_at_their_number_and_at_the_timeout(kind: type[Script], gather: Gather) -> None:
    full = [UnavailableError("full")]
    for limits, attempts in ((Limits(5.0, None, 1), 2), (Limits(5.0, None, 0), 1), (Limits(0.1, None, 50), 1)):
        script = kind(*[full] * 5)
        with pytest.raises(UnavailableError):
            gather(script, limits)
        assert script.num_asked == attempts


@both
def test_patience_is_for_the_whole_answer_or_for_the_next_piece(kind: type[Script], gather: Gather) -> None:
    for limits, sentence in {
        Limits(timeout=0.05): r"the answer was not complete after 0.05 s \(timeout\)",
        Limits(timeout=9, delta_timeout=0.05): r"no piece of the answer for 0.05 s \(delta_timeout\)",
    }.items():
        script = kind([piece("a", 1), TimeoutError()])
        with pytest.raises(AnswerTimeoutError, match=sentence) as caught:
            gather(script, limits)
        assert isinstance(caught.value, TimeoutError)
        assert script.num_left == 1


@pytest.mark.parametrize("num_turns", range(6))
def test_a_cancelled_wait_stays_cancelled_although_the_result_comes_in_the_same_moment(num_turns: int) -> None:
    async def ask() -> None:
        result = asyncio.get_running_loop().create_future()

        async def awaited() -> int:
            return await result

        waiting = asyncio.ensure_future(within(5.0, awaited()))
        await asyncio.sleep(0.01)
        result.set_result(7)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            assert waiting.result() == 7

    asyncio.run(ask())


def test_leaving_the_iterator_leaves_the_call_once() -> None:
    for leave in ("break", "close", "with"):
        script = Script(WHOLE)
        stream = Stream(script, QUESTION, FAST)
        if leave == "with":
            with stream:
                assert next(stream).text == "a"
        else:
            for _ in stream:
                break
            assert script.num_left == 0
            stream.close()
        assert script.num_left == 1
        assert list(stream) == []
        assert stream.answer == Answer("a", (1,), None, Usage(5, 4, 1))


def test_a_stream_that_nobody_holds_any_more_is_left() -> None:
    script = Script(WHOLE)
    for _ in Stream(script, QUESTION, FAST):
        break
    assert script.num_left == 1
