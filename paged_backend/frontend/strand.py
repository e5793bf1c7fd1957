"""One sequence's part of an answer: a request of n answers is n sequences in the engine, a strand each here."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from paged_backend.engine_client.live_requests import Piece
from paged_backend.errors import RequestError
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.detokenizer import AnswerText
from paged_backend.messages import Finish, Found, TokenScores
from paged_backend.request import SamplingParams

SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a request's strands; odd, so that they differ


class Strand:
    """One sequence's part of an answer. Not thread-safe: the answer's lock orders the calls."""

    def __init__(self, index: int, text: AnswerText, wants_logprobs: bool) -> None:
        self.index = index
        self.request_id: int | None = None  # the engine's, once submitted
        self.over = False
        self.cumulative_logprob = 0.0
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._text = text
        self._step = None if wants_logprobs else text.step
        self._wants_logprobs = wants_logprobs

    def prepare(self) -> None:
        """Does what the first token's text takes besides it, while the engine computes that token."""
        self._text.prepare()

    def pass_over(self, token_ids: list[int]) -> None:
        """Takes tokens that the caller has already.

        Raises:
            RequestError: the answer ends with them.
        """
        if self._text.add(token_ids, None).stopped:
            raise RequestError("answer_ids: a stop string ends the answer within them")

    def take_token(self, piece: Piece, prompt_len: int) -> Delta | None:
        """What a piece adds that is a token in the midst of an answer, as most are by far. None: it is more than that,
        and to be taken by `take`.
        """
        token_ids = piece.token_ids
        if self._step is None or len(token_ids) != 1 or piece.finish is not None or piece.num_cached_tokens is not None:
            return None
        self.num_tokens += 1
        return Delta(
            index=self.index,
            text=self._step(token_ids[0]),
            token_ids=token_ids,
            num_input_tokens=prompt_len,
            num_cached_tokens=self.num_cached_tokens,
        )

    def take(self, piece: Piece, prompt_len: int) -> tuple[Delta, bool]:
        """What the piece adds; and whether the engine must be told to stop."""
        finish = piece.finish
        passage = self._text.add(piece.token_ids, None if finish is None else finish.reason)
        if passage.stopped:
            finish = Finish(0, "stop")
        if piece.num_cached_tokens is not None:
            self.num_cached_tokens = piece.num_cached_tokens
        self.num_tokens += passage.num_tokens
        logprobs: tuple[TokenScores, ...] = ()
        if self._wants_logprobs:
            logprobs = piece.logprobs[: passage.num_tokens]
            self.cumulative_logprob += sum(next(iter(entry.values()))[0] for entry in logprobs)
        self.over = finish is not None
        self.finish_reason = None if finish is None or finish.error is not None else finish.reason
        delta = Delta(
            index=self.index,
            text=passage.text,
            token_ids=piece.token_ids if finish is None else piece.token_ids[: passage.num_tokens],
            logprobs=logprobs,
            cumulative_logprob=self.cumulative_logprob,
            num_input_tokens=prompt_len,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=self.finish_reason,
            error=None if finish is None or finish.error is None else RequestError(finish.message, finish.error),
        )
        return delta, passage.stopped and piece.finish is None


def beam_pieces(piece: Piece, found: Found) -> Iterator[Piece]:
    """What a beam search came to, sequence after sequence."""
    for sequence in found.sequences:
        token_ids = tuple(np.frombuffer(sequence.token_ids, np.int32).tolist())
        logprobs: list[float] = np.frombuffer(sequence.logprobs, np.float32).tolist()
        finish = Finish(found.request_id, "stop" if sequence.stopped else "length")
        scores = tuple([{token: (logprob, None)} for token, logprob in zip(token_ids, logprobs, strict=True)])
        yield msgspec.structs.replace(piece, token_ids=token_ids, logprobs=scores, finish=finish)


def strand_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """A strand's own: the first has the caller's seed, the others one that follows from it. The prompt is the same: the
    first tells of it.
    """
    if index == 0:
        return sampling
    seed = None if sampling.seed is None else (sampling.seed + index * SEED_STEP) % 2**64
    return msgspec.structs.replace(sampling, seed=seed, prompt_logprobs=None)
