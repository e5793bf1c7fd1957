"""Requests as they arrive: each becomes a sequence, or is refused with an error that says which limit it met."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.beams import Beams
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.sequence import Sequence


class Intake:
    """Owns the numbers that say who came first. A refusal changes nothing."""

    def __init__(self, limits: SchedulerLimits, guides: GrammarMasks, beams: Beams) -> None:
        self._limits = limits
        self._guides = guides
        self._beams = beams
        self._next_arrival_index = 0

    def take(self, request: Submit, num_waiting: int) -> Sequence | Finish:
        """num_waiting: requests in the queue before it. A Finish: it is refused."""
        token_ids = np.frombuffer(request.prompt_ids, np.int32)
        sampling = request.sampling
        eos_ids = () if sampling.ignore_eos else self._limits.eos_ids
        stop_ids = tuple(dict.fromkeys(eos_ids + sampling.stop_token_ids))
        allowed = np.frombuffer(request.allowed, np.int32) if request.allowed else None
        prompt_len = len(token_ids) - request.num_answered
        length_limit = min(prompt_len + (sampling.max_tokens or self._limits.max_model_len), self._limits.max_model_len)
        refusal = (
            self._refusal(token_ids, request.resumed, num_waiting)
            or self._guides.refusal(sampling, stop_ids, request.bad_words, allowed)
            or self._beams.refusal(sampling, prompt_len, length_limit)
        )
        if refusal is not None:
            return Finish(request.request_id, error=refusal[0], message=refusal[1])
        arrival_index = self._next_arrival_index = self._next_arrival_index + 1
        finds = self._limits.prefix_cache and not sampling.skip_prefix_cache
        sequence = Sequence(
            request_id=request.request_id,
            arrival_index=arrival_index,
            token_ids=token_ids,
            prompt_len=prompt_len,
            length_limit=length_limit,
            sampling=sampling,
            seed=self._own_seed(arrival_index) if sampling.seed is None else sampling.seed & (2**64 - 1),
            stop_ids=stop_ids,
            bad_words=request.bad_words,
            cache_salt=f"salt {request.cache_salt}" if finds else f"family {request.family}",
            shares=finds or request.family is not None,
            arrival=request.arrival,
            suspect=request.suspect,
            resumed=request.resumed,
            deadline_seconds=min(sampling.request_deadline_seconds or math.inf, self._limits.request_deadline_seconds),
            answered=request.num_answered > 0,
            guide=self._guides.guide(sampling, stop_ids, allowed, request.cache_salt),
            allowed=None if sampling.guided else allowed,
        )
        if sampling.prompt_logprobs is not None and not sequence.answered:
            sequence.unscored = 0
        self._beams.enrol(sequence)
        return sequence

    def _refusal(self, token_ids: Int32, resumed: bool, num_waiting: int) -> tuple[ErrorKind, str] | None:
        limits = self._limits
        if num_waiting >= limits.max_queue_size and not resumed:
            return ErrorKind.OVERLOADED, f"{num_waiting} requests are waiting, the limit is {limits.max_queue_size} (max_queue_size)"
        if not 0 < len(token_ids) < limits.max_model_len:
            return ErrorKind.INVALID, f"prompt: {len(token_ids)} tokens, expected 1 to {limits.max_model_len - 1} (max_model_len - 1)"
        if token_ids.min() < 0 or token_ids.max() >= limits.vocab_size:  # front ends look, too; on a device it would end everybody's engine
            return ErrorKind.INVALID, f"prompt: token ids from {token_ids.min()} to {token_ids.max()}, this model's are 0 to {limits.vocab_size - 1}"
        return None

    def _own_seed(self, arrival_index: int) -> int:
        return int.from_bytes(blake2b(f"{self._limits.seed}/{arrival_index}".encode(), digest_size=8).digest(), "little")
