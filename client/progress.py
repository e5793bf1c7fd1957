"""What has come of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from paged_client.answers import Answer, Delta, LogprobEntry, Outputs, Usage, deltas_of


@dataclass
class _Sequence:
    """One of the request's sequences."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, delta: Delta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    def answer(self, usage: Usage, prompt_logprobs: tuple[LogprobEntry | None, ...]) -> Answer:
        return Answer(
            "".join(self.texts),
            tuple(self.token_ids),
            self.finish_reason,
            usage,
            tuple(self.logprobs),
            prompt_logprobs=prompt_logprobs,
        )


class Progress:
    """Gathers the responses of one request."""

    def __init__(self) -> None:
        self.over = False
        self._sequences = [_Sequence()]
        self._usage = Usage()
        self._prompt_logprobs: tuple[LogprobEntry | None, ...] = ()
        self._embedding: tuple[float, ...] = ()

    @property
    def begun(self) -> bool:
        return any(sequence.token_ids or sequence.texts for sequence in self._sequences)

    @property
    def answer(self) -> Answer:
        first, *others = (sequence.answer(self._usage, self._prompt_logprobs) for sequence in self._sequences)
        return msgspec.structs.replace(first, others=tuple(others), embedding=self._embedding)

    def take(self, outputs: Outputs, final: bool) -> list[Delta]:
        """A response's Deltas, without those that have nothing to say."""
        self.over = final
        if not outputs:
            return []
        deltas = [
            delta
            for delta in deltas_of(outputs, self._usage.num_output_tokens)
            if delta.text or delta.token_ids or delta.finish_reason
        ]
        if "embedding" in outputs:
            self._embedding = tuple(outputs["embedding"])
        for delta in deltas:
            while delta.sequence_index >= len(self._sequences):
                self._sequences.append(_Sequence())
            self._sequences[delta.sequence_index].take(delta)
            self._usage = delta.usage
            self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        return deltas
