"""A chat's answer in which reasoning and tool calls are told apart from content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paged_client.answers import Answer, Delta, Usage
from paged_client.openai.answer_forms import ChatForm, reasoning_tokens
from paged_client.openai.formats.events import CallArguments, CallBegun, Content, Event, Message, Reasoning, message_of
from paged_client.openai.formats.parser import Parser
from paged_client.openai.responses import ChatReply
from paged_client.openai.translation import Asked


@dataclass
class _Choice:
    """One choice, so far as it has come."""

    parser: Parser
    reasoned: bool  # something was reasoning, or the prompt has begun it
    num_tokens: int = 0
    num_until_closed: int | None = None  # of them, up to the first that ends reasoning

    def count(self, token_ids: Sequence[int], closer_id: int | None) -> None:
        """Of one more piece. Nothing of it is kept: a stream that tells its usage with every piece asks as often."""
        if self.num_until_closed is None and closer_id in token_ids:
            self.num_until_closed = self.num_tokens + token_ids.index(closer_id) + 1
        self.num_tokens += len(token_ids)


class ParsedChatReply(ChatReply):
    def __init__(self, model: str, asked: Asked, form: ChatForm, request_id: str | None = None) -> None:
        super().__init__(model, asked, request_id)
        self._form = form
        self._choices: dict[int, _Choice] = {}
        self._num_reasoning: int | None = 0  # tokens of whole answers

    # ---- whole

    def _choice(self, index: int, prompt: int, answer: Answer) -> dict[str, Any]:
        parser = self._form.answer.parser()
        said = message_of(self._wanted([*parser.feed(answer.text), *parser.finish()]))
        choice = _Choice(parser, bool(said.reasoning) or self._form.answer.begins_reasoning)
        choice.count(answer.token_ids, self._form.closer_id)
        self._num_reasoning = self._with_reasoning(self._num_reasoning, choice)
        return {
            "index": index,
            "message": self._message(said),
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": _reason(answer.finish_reason, bool(said.calls)),
        }

    def _message(self, said: Message) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.content or None, "refusal": None}
        if not said.calls:
            message["content"] = said.content
        else:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in said.calls
            ]
        if said.reasoning:
            message |= {"reasoning": said.reasoning, "reasoning_content": said.reasoning}
        return message

    def usage(self, usages: Iterable[Usage]) -> dict[str, Any]:
        num_reasoning = self._num_reasoning
        for choice in self._choices.values():
            num_reasoning = self._with_reasoning(num_reasoning, choice)
        usage = super().usage(usages)
        if num_reasoning is not None and self._form.reasons:
            usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        return usage

    def _with_reasoning(self, num_reasoning: int | None, choice: _Choice) -> int | None:
        """A choice's added to those of others; None: it cannot be told."""
        found = reasoning_tokens(self._form, choice.num_tokens, choice.num_until_closed, choice.reasoned)
        return None if found is None or num_reasoning is None else num_reasoning + found

    # ---- streamed

    def chunks(self, prompt: int, delta: Delta) -> Iterator[dict[str, Any]]:
        index = self._index(prompt, delta.sequence_index)
        if index not in self._choices:
            form = self._form.answer
            self._choices[index] = _Choice(form.parser(), form.begins_reasoning)
            for opening in self._opening(index, prompt, delta):
                yield self._chunk([opening])
        choice = self._choices[index]
        if self._form.reasons:
            choice.count(delta.token_ids, self._form.closer_id)
        events = self._wanted(choice.parser.feed(delta.text))
        if delta.finish_reason:
            events += self._wanted(choice.parser.finish())
        choice.reasoned = choice.reasoned or any(isinstance(event, Reasoning) for event in events)
        deltas = [_delta_of(event) for event in _joined(events)]
        if not deltas and (delta.logprobs or delta.finish_reason):
            deltas = [{}]
        for place, said in enumerate(deltas):
            last = place == len(deltas) - 1
            reason = _reason(delta.finish_reason, choice.parser.num_calls > 0) if last else None
            yield self._chunk(
                [
                    {
                        "index": index,
                        "delta": said,
                        "logprobs": self._logprobs(delta.logprobs) if last else None,
                        "finish_reason": reason,
                    }
                ]
            )

    def _wanted(self, events: list[Event]) -> list[Event]:
        return [event for event in events if self._is_wanted(event)]

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, Reasoning):
            return self._form.tells_reasoning
        if isinstance(event, (CallBegun, CallArguments)):
            return self._form.parallel or event.index == 0
        return True


def _joined(events: list[Event]) -> Iterator[Event]:
    """Pieces of a kind that follow one another as one."""
    last: Event | None = None
    for event in events:
        match last, event:
            case (Content(before), Content(text)):
                last = Content(before + text)
            case (Reasoning(before), Reasoning(text)):
                last = Reasoning(before + text)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                last = CallArguments(index, before + text)
            case _:
                if last is not None:
                    yield last
                last = event
    if last is not None:
        yield last


def _delta_of(event: Event) -> dict[str, Any]:
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning": text, "reasoning_content": text}
        case CallBegun(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _reason(finish_reason: str | None, calls: bool) -> str | None:
    return "tool_calls" if calls and finish_reason == "stop" else finish_reason
