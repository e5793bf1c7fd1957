"""What came of a request, and whether it is right: compared with what the same request got when it was alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tests.chaos.wishes import Wish

_LOGPROB_TOLERANCE = 2e-3  # float32 sums in another order: who else is in a step decides how its matrices are tiled
DEADLINE = "request_deadline_seconds"
QUEUE_FULL = "max_queue_size"


@dataclass
class Heard:
    """What came of a request, per sequence."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)  # of the chosen tokens
    reasons: dict[int, str] = field(default_factory=dict)
    # each time that the prompt's logprobs were told: of every token but the first
    prompts: list[list[dict[int, float]]] = field(default_factory=list)
    finals: int = 0
    after_final: int = 0  # responses that came after the final one
    error: str = ""
    # the server process itself ended meanwhile, or the connection to it: who is to blame is found out elsewhere
    lost_with_server: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))

    def add(self, index: int, text: str, token_ids: list[int], logprobs: list[float], reason: str | None) -> None:
        self.texts[index] = self.texts.get(index, "") + text
        self.token_ids.setdefault(index, []).extend(token_ids)
        self.logprobs.setdefault(index, []).extend(logprobs)
        if reason is not None:
            self.reasons[index] = reason


def judge(
    wish: Wish, right: Heard, heard: Heard, *, left: bool = False, may_end: tuple[str, ...] = ()
) -> tuple[str, str]:
    """(outcome, fault): the fault is empty if what was heard is right.

    left: the caller left, so the answer may break off anywhere. may_end: an error that says one of these may end the
        answer.
    """
    if heard.after_final or heard.finals > 1:
        return "wrong", f"{heard.finals} final responses, {heard.after_final} after the first of them"
    fault = _foreign(right, heard)
    if fault:
        return "wrong", fault
    if heard.error:
        named = next((reason for reason in may_end if reason in heard.error), "")
        return (f"ended: {named}", "") if named else ("error", heard.error)
    if left and heard.finals == 0:
        return "left", ""
    if heard.finals != 1:
        return "wrong", "no final response"
    if (heard.token_ids, heard.texts, heard.reasons) != (right.token_ids, right.texts, right.reasons):
        return "wrong", f"incomplete: {heard}, right is {right}"
    if wish.prompt_logprobs and len(heard.prompts) != 1:
        return "wrong", f"the prompt's logprobs came {len(heard.prompts)} times"
    if wish.logprobs and any(len(heard.logprobs[index]) != len(ids) for index, ids in heard.token_ids.items()):
        return "wrong", f"not a logprob for every token: {heard}"
    return "whole", ""


def _foreign(right: Heard, heard: Heard) -> str:
    """A token, a piece of text or a logprob that is not the beginning of the right answer."""
    for index, ids in heard.token_ids.items():
        if right.token_ids[index][: len(ids)] != ids:
            return f"sequence {index} began with tokens {ids}, right is {right.token_ids[index]}"
        if not right.texts[index].startswith(heard.texts[index]):
            return f"sequence {index} began with {heard.texts[index]!r}, right is {right.texts[index]!r}"
        pairs = zip(heard.logprobs[index], right.logprobs[index], strict=False)
        if not all(math.isclose(_logprob(got), _logprob(wanted), abs_tol=_LOGPROB_TOLERANCE) for got, wanted in pairs):
            return f"sequence {index} has logprobs {heard.logprobs[index]}, right is {right.logprobs[index]}"
    for told in heard.prompts:
        if len(told) != len(right.prompts[0]) or not all(map(_same, told, right.prompts[0])):
            return f"the prompt has logprobs {told}, right is {right.prompts}"
    return ""


def _logprob(entry: float | tuple[float, int]) -> float:
    """Of a token; with a rank beside it, which a tie may change."""
    return entry[0] if isinstance(entry, tuple) else entry


def _same(told: dict[int, float], right: dict[int, float]) -> bool:
    """Of a token of the prompt, and of likely ones: which of two that are as likely comes last is nobody's fault."""
    both = told.keys() & right.keys()
    return (
        len(told) == len(right)
        and len(both) >= len(right) - 1
        and all(math.isclose(told[one], right[one], abs_tol=_LOGPROB_TOLERANCE) for one in both)
    )
