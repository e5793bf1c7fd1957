"""Requests as they arrive: each becomes a sequence, or is refused with an error that says which limit it met."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import features_of
from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish, Submit
from paged_backend.scheduler.features import LiveFeatures
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.sequence import Sequence, SequenceSpec
from paged_backend.scheduler.sequence_pages import PageTable


class Intake:
    """Owns the numbers that say who came first. A refusal changes nothing."""

    def __init__(self, limits: SchedulerLimits, features: LiveFeatures) -> None:
        self._limits = limits
        self._features = features
        self._next_arrival_index = 0

    def take(self, request: Submit, num_waiting: int) -> Sequence | Finish:
        """num_waiting: requests in the queue before it. A Finish: it is refused."""
        token_ids = np.frombuffer(request.prompt_ids, np.int32)
        refusal = self._refusal(token_ids, request.resumed, num_waiting)
        if refusal is None:
            spec, salt = self._spec(request, token_ids), self._salt(request)
            sequence = Sequence(
                spec, token_ids, PageTable(salt, self._limits.num_groups), answered=request.num_answered > 0
            )
            refusal = self._features.refusal(sequence, request)
        if refusal is not None:
            return Finish(request.request_id, error=refusal[0], message=refusal[1])
        self._next_arrival_index += 1
        self._features.enter(sequence, request)
        return sequence

    def _spec(self, request: Submit, token_ids: Int32) -> SequenceSpec:
        """All that is known of a request when it comes."""
        limits, sampling, arrival_index = self._limits, request.sampling, self._next_arrival_index + 1
        eos_ids = () if sampling.ignore_eos else limits.eos_ids
        stop_ids = tuple(dict.fromkeys(eos_ids + sampling.stop_token_ids))
        prompt_len = len(token_ids) - request.num_answered
        return SequenceSpec(
            request_id=request.request_id,
            arrival_index=arrival_index,
            arrival=request.arrival,
            prompt_len=prompt_len,
            length_limit=min(prompt_len + (sampling.max_tokens or limits.max_model_len), limits.max_model_len),
            sampling=sampling,
            seed=self._own_seed(arrival_index) if sampling.seed is None else sampling.seed & (2**64 - 1),
            stop_ids=stop_ids,
            bad_words=request.bad_words,
            features=features_of(sampling, stop_ids, request.bad_words, restricted=bool(request.allowed)),
            resumed=request.resumed,
            traced=request.traced,
        )

    def _salt(self, request: Submit) -> str | None:
        """Who may share pages with it: all of the same salt, or only requests of the same prompt, or nobody."""
        if self._limits.prefix_cache and not request.sampling.skip_prefix_cache:
            return f"salt {request.cache_salt}"
        return None if request.family is None else f"family {request.family}"

    def _refusal(self, token_ids: Int32, resumed: bool, num_waiting: int) -> tuple[ErrorKind, str] | None:
        limits = self._limits
        if num_waiting >= limits.max_queue_size and not resumed:
            return (
                ErrorKind.OVERLOADED,
                f"{num_waiting} requests are waiting, the limit is {limits.max_queue_size} (max_queue_size)",
            )
        if not 0 < len(token_ids) < limits.max_model_len:
            return (
                ErrorKind.INVALID,
                f"prompt: {len(token_ids)} tokens, expected 1 to {limits.max_model_len - 1} (max_model_len - 1)",
            )
        # front ends look, too; on a device it would end everybody's engine
        if token_ids.min() < 0 or token_ids.max() >= limits.vocab_size:
            return (
                ErrorKind.INVALID,
                f"prompt: token ids from {token_ids.min()} to {token_ids.max()}, this model's are 0 to "
                f"{limits.vocab_size - 1}",
            )
        return None

    def _own_seed(self, arrival_index: int) -> int:
        return int.from_bytes(
            blake2b(f"{self._limits.seed}/{arrival_index}".encode(), digest_size=8).digest(), "little"
        )
