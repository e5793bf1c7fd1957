"""What front ends and the engine process say to each other: msgspec structs in msgpack over ZeroMQ ipc sockets.

A front end binds a PULL socket and announces it with `Hello`; the engine binds the inbox. Nobody speaks of another
front end's requests: a request id carries its front end in the upper bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from paged_backend.errors import ErrorKind
from paged_backend.process_id import ProcessId
from paged_backend.request import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """What the engine needs to know of a request, all limits checked."""

    token_ids: NDArray[np.int32]  # [prompt_len], prompt_len >= 1
    sampling: SamplingParams  # max_tokens set, and such that prompt and answer fit into max_model_len
    bad_words: tuple[tuple[int, ...], ...]  # token sequences that must never be completed
    allowed: NDArray[np.int32] | None = None  # [ceil(vocab / 32)] a bit per token, the first in the lowest; None: all
    answer_ids: NDArray[np.int32] | None = None  # the answer's first tokens, which the caller has from another server


class ExportedTemplate(msgspec.Struct, frozen=True):
    """What chat_template.json holds: the checkpoint's templates by name (one called "default" as a rule), and the words
    they may use.
    """

    templates: dict[str, str]
    special_tokens: dict[str, Any]  # bos_token, eos_token …: the template's variables
    response_template: dict[str, Any] | None = None  # transformers': how to read what the model answers


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """A request's end, as the engine tells it: `reason` "stop" or "length", or `error` with a message for the
    caller.
    """

    request_id: int
    reason: str = ""
    error: ErrorKind | None = None
    message: str = ""


TokenScores = Mapping[int, tuple[float, int | None]]
"""Token id -> log-probability, and rank in the vocabulary (1: no token is more likely; None: a beam search does not
know it).
"""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Log-probabilities of k consecutive tokens of a prompt, each given those before it. Arrays are in native byte
    order.
    """

    request_id: int
    start: int  # position in the prompt of the first of them, at least 1
    logprobs: bytes  # float32 [k]
    ranks: bytes  # int32 [k]; 1: no token is more likely
    top_ids: bytes  # int32 [k, n] the most likely instead of it, most likely first
    top_logprobs: bytes  # float32 [k, n]


class PromptEmbedding(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A prompt's embedding, as it was pooled: neither shortened nor normalised."""

    request_id: int
    values: bytes  # float32 [hidden_size], native byte order


PromptReport = PromptLogprobs | PromptEmbedding
"""What a step tells of a prompt, beside the tokens that it samples."""


class FoundSequence(msgspec.Struct, frozen=True, array_like=True):
    """One answer of a beam search. Arrays are in native byte order."""

    token_ids: bytes  # int32 [t], the stop id included
    logprobs: bytes  # float32 [t]
    stopped: bool  # by a stop id, not by its length


class Found(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a beam search came to."""

    request_id: int
    sequences: tuple[FoundSequence, ...]  # the best first


FeatureOutput = PromptReport | Found
"""What a feature has to tell a request beside tokens."""


_FRONT_END_SHIFT = 40
ENGINE_SOCKET = "engine.sock"  # in the engine's folder: its inbox
SUSPECT_FILE = "suspect"  # in the engine's folder: request id of the suspect that runs, or nothing
# in the engine's folder: int64, the ids of the requests that run or are looked at, anything negative between them
RUNNING_FILE = "running"
QUEUE_FILE = "queue"  # in the engine's folder: int64 [2], how many requests wait at the moment, and how many run
KV_SOCKET = "kv.sock"  # in the folder of one of several replicas: its KV events (engine/kv_event_publisher.py)
# after the folder in an engine's command line: it waits for a second line on stdin before it becomes the engine
STANDBY = "--standby"
# before the folder in an engine's command line: as clients call the model, for the log and for those who watch
MODEL_NAME = "--model-name="
# there too: which of several replicas it is, for those who watch
REPLICA = "--replica="
ENGINE_NAME = "paged-engine"  # of the process that is
# a request that brought so many since it was resumed did not cause the death before: it was resumed where that happened
CLEARED_AFTER_TOKENS = 3


def request_id_of(front_end: int, number: int) -> int:
    """The id of a front end's `number`-th request: unique in the engine, 63 bits."""
    return front_end << _FRONT_END_SHIFT | number


def front_end_of(request_id: int) -> int:
    return request_id >> _FRONT_END_SHIFT


def number_of(request_id: int) -> int:
    return request_id & ((1 << _FRONT_END_SHIFT) - 1)


def front_ends_of(request_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return request_ids >> _FRONT_END_SHIFT


# front end -> engine


class Hello(msgspec.Struct, frozen=True, tag=True):
    front_end: int
    address: str  # the ZeroMQ address of the front end's inbox
    process: ProcessId | None = None  # whose death is noticed


class Submit(msgspec.Struct, frozen=True, tag=True):
    request_id: int
    prompt_ids: bytes  # int32, native byte order: [prompt_len]
    sampling: SamplingParams  # max_tokens is set
    bad_words: tuple[tuple[int, ...], ...]  # sampling.bad_words as token ids
    cache_salt: str
    arrival: float  # seconds, CLOCK_MONOTONIC: the same clock in every process of the machine
    # the same for requests of one prompt: they share its pages even where the prefix cache is off
    family: int | None = None
    num_answered: int = 0  # the last of prompt_ids are the answer so far: a request goes on in a new engine
    resumed: bool = False  # an engine that died had it: it was let in once, whatever the queue's length is now
    # int32 [ceil(vocab / 32)]: a bit per token, the first in the lowest; empty: every token is allowed
    allowed: bytes = b""
    suspect: bool = False  # engines died over and over while it ran: it must not run beside another suspect
    traced: bool = False  # its times are told: Tokens.admitted


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: int


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    front_end: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine once it has no request left, or after `patience_seconds`."""

    patience_seconds: float


ToEngine = Hello | Submit | Abort | Goodbye | Shutdown

# engine -> front end


PROPOSERS = ("ngram", "draft", "mtp", "eagle3")


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to Hello: everything a front end must know to check requests and speak the model's language."""

    tokenizer_path: str | None  # a tokenizer.json written by the engine; None: the checkpoint has none, input_ids only
    vocab_size: int  # ids below this are embeddings
    max_model_len: int
    max_pool_tokens: int  # of one sequence that has all pages
    page_size: int
    num_pages: int
    max_num_sequences: int = 0  # that may run at once
    sampling: dict[str, float] = {}  # what the checkpoint's makers recommend, by sampling key
    pooling: Literal["last", "mean"] = "last"  # of embeddings, where a request does not say
    embedding_size: int = 0  # numbers of an embedding; 0: of an engine that makes none
    makes_text: bool = True  # False: the checkpoint has no head, and makes embeddings alone
    proposer: str = ""  # who makes drafts, one of PROPOSERS; empty: nobody


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """What a step (or several) brought to one front end's requests: parallel arrays, an entry per token; a step with
    drafts may bring a request several, in their order.
    """

    request_ids: bytes  # int64 [k]
    token_ids: bytes  # int32 [k]
    logprobs: bytes = b""  # float32 [k], or empty if nobody asked
    ranks: bytes = b""  # int32 [k], with logprobs
    top_logprobs: dict[int, dict[int, float]] = {}  # entry -> token id -> logprob, most likely first
    started: dict[int, int] = {}  # request id -> num_cached_tokens, with a request's first token
    # request id -> seconds, CLOCK_MONOTONIC, when it left the queue; with the first token of a traced request
    admitted: dict[int, float] = {}
    feature_outputs: tuple[FeatureOutput, ...] = ()
    finishes: tuple[Finish, ...] = ()  # after all of the above


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The engine's gauges and counters, sent a few times a second."""

    pages_free: int
    pages_held: int
    pages_cached: int
    live_tokens: int  # tokens of running sequences whose K and V are in the pool
    num_running: int
    num_waiting: int
    num_preemptions: int  # since the start
    prefix_queries: int  # prompt tokens looked up since the start
    prefix_hits: int  # of which were found
    num_steps: int
    drafts_proposed: int = 0  # since the start
    drafts_accepted: int = 0  # of which were right
    drafts_checked: int = 0  # times that a sequence had any in a step
    queue_times: tuple[float, ...] = ()  # seconds from arrival to admission, of requests admitted since the last Stats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; the sentence is for the operator."""

    message: str


FromEngine = Ready | Tokens | Stats | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
