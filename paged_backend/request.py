"""What a caller asks for: plain data, validated here. Names follow vLLM's sampling parameters, so its clients work
unchanged.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from paged_backend.errors import RequestError
from paged_backend.grammar.options import (
    Choices,
    Grammar,
    GrammarString,
    StructuredOutputs,
    check_grammars,
    fold,
    grammars_of,
)

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 8192  # of all stop strings together: each may become a state of what looks for them
MAX_STOP_TOKENS = 64
MAX_START_TOKENS = 16  # that begin thinking
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16
MAX_LOGIT_BIAS = 1024
MAX_WORD_CHARS = 1024
MAX_LOGPROBS = 20
MAX_ALLOWED_TOKENS = 65_536
MAX_LORA_NAME_CHARS = 128
MAX_SEQUENCES = 64  # of one request
MAX_BEAM_WIDTH = 16
MAX_LENGTH_PENALTY = 5
MAX_DIMENSIONS = 1_048_576  # that can be asked for; how many an embedding has, the model says

Word = Annotated[str, Meta(min_length=1, max_length=MAX_WORD_CHARS)]
LoraName = Annotated[str, Meta(min_length=1, max_length=MAX_LORA_NAME_CHARS)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to choose tokens and when to stop. `None` for max_tokens and seed means: the engine's default."""

    n: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] = 1
    # so many are tried, the n likeliest are the answer
    best_of: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | None = None
    use_beam_search: bool = False  # instead of sampling: the n best of beam_width answers
    beam_width: Annotated[int, Meta(ge=1, le=MAX_BEAM_WIDTH)] | None = None
    # answers are ranked by total logprob / length ** this
    length_penalty: Annotated[float, Meta(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] = 1.0
    # end when there are beam_width answers; False: when better ones are unlikely; "never": impossible
    early_stopping: bool | Literal["never"] = False
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0  # 0: greedy
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] = 0  # 0 or -1: off
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: int | None = None  # 64 bits, signed or not
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    stop: Annotated[tuple[Word, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    bad_words: Annotated[tuple[Word, ...], Meta(max_length=MAX_BAD_WORDS)] = ()
    # no other token is chosen
    allowed_token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    # None: none; 0: the chosen token's; n: the n most likely too
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    # the same of the prompt's tokens; all of the prompt is computed then
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    # after so many of the answer, thinking that is not over is ended
    max_thinking_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    end_thinking_token_id: TokenId | None = None  # by this token
    # the answer thinks once it has these tokens, one after another; (): from the start
    start_thinking_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_START_TOKENS)] = ()
    # only so many of the prompt's last tokens; -1: as many as the model takes
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    # those that the tokenizer puts around a text; None: around text_input, not around messages
    add_special_tokens: bool | None = None
    detokenize: bool = True  # False: the answer is token ids, without text
    # the lower, the sooner it starts and the later it is preempted
    priority_level: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    request_deadline_seconds: Annotated[float, Meta(gt=0)] | None = None  # None, or more than the engine's own: that
    speculation: Literal["off"] | None = None  # None: as the engine's tunable says
    skip_prefix_cache: bool = False  # neither finds pages of others nor leaves any

    lora_name: LoraName | None = None  # one of the server's adapters

    # with the task embed: which of the prompt's hidden states are the embedding, and what becomes of it
    # the last token's, or the mean of all; None, and the task is embed: the checkpoint's own
    pooling: Literal["last", "mean"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_DIMENSIONS)] | None = None  # only so many of the first
    normalize: bool = True  # to length 1

    guided_json: GrammarString | None = None  # a JSON schema
    guided_regex: GrammarString | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarString | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def guided(self) -> bool:
        """The answer must match something."""
        outputs = self.structured_outputs
        guides = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return any(guide is not None for guide in guides) or (outputs is not None and outputs.asks)

    @property
    def grammars(self) -> list[Grammar]:
        """What the answer must match; one at most, once checked."""
        return grammars_of(
            self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, self.structured_outputs
        )

    @property
    def grammar(self) -> Grammar | None:
        return next(iter(self.grammars), None)


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """Which optional output tensors the caller asked for, and whether an error's text begins with its code."""

    finish_reason: bool = False
    cumulative_logprob: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    output_ids: bool = False
    num_cached_tokens: bool = False
    # which of the request's sequences each entry belongs to; always, if there are several and the answer is streamed
    sequence_index: bool = False
    error_code: bool = False  # the only way in which a gRPC stream, or a stream that has begun, can carry one


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation for the model's chat template, as the caller wrote it: parsed where the template is rendered."""

    messages: str  # JSON: a list of objects with role and content
    tools: str | None = None  # JSON: a list of function descriptions
    add_generation_prompt: bool = True  # end with the opening of the assistant's turn
    template_kwargs: Mapping[str, Any] = {}  # variables that the template reads, such as enable_thinking
    continue_final_message: bool = False  # end within the last message, which the answer continues


Task = Literal["generate", "embed", "tokenize", "detokenize", "describe"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One caller's question after the tensors were read: one of `text`, `input_ids` and `chat` is set."""

    text: str | None
    input_ids: NDArray[np.integer[Any]] | None  # [prompt_len] of any integer type
    chat: Chat | None = None
    sampling: SamplingParams
    outputs: Outputs
    stream: bool
    prepend_prompt: bool  # text_output begins with the prompt (stream=false without exclude_input_in_output)
    cache_salt: str = ""
    arrival: float  # seconds, time.monotonic()
    # [n] of any integer type: the answer's first tokens, sent by another server
    answer_ids: NDArray[np.integer[Any]] | None = None
    caller_id: str = ""  # what the caller calls it, for the log
    trace: Mapping[str, str] = {}  # W3C headers: in the course of which span it was sent
    task: Task = "generate"  # those after "embed" need no engine, and "describe" no prompt
    embedding_as_text: bool = False  # text_output has the embedding, as NVIDIA's vLLM backend answers its own input


def parse_sampling(options: Mapping[str, Any]) -> SamplingParams:
    """Checks and coerces `options` (numbers may be strings, as genai-perf sends them; one string may stand for a list
    of one).

    Raises:
        RequestError: names the key, the value and what is allowed.
    """
    given = {
        key: [value] if key in ("stop", "bad_words") and isinstance(value, str) else value
        for key, value in fold(options).items()
        if value is not None
    }
    for key, value in given.items():
        if key not in SamplingParams.__struct_fields__:
            meant = difflib.get_close_matches(key[:80].casefold(), SamplingParams.__struct_fields__, 1)
            hint = f": did you mean '{meant[0]}'?" if meant else "; the names are those of vLLM's sampling parameters"
            raise RequestError(f"unknown sampling parameter '{_shorten(key)}'{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{key}: {value} is not a finite number")
    try:
        sampling = msgspec.convert(given, SamplingParams, strict=False)
    except (msgspec.ValidationError, OverflowError) as error:
        raise RequestError(_explain(str(error), given)) from None
    _require_finite(sampling)
    check_grammars(sampling.grammars)
    if sampling.lora_name is not None:
        _check_lora_name(sampling.lora_name)
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        raise RequestError(f"seed: expected 64 bits, got {_shorten(str(sampling.seed))}")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise RequestError(f"min_tokens: {sampling.min_tokens} is more than max_tokens ({sampling.max_tokens})")
    if sampling.best_of is not None and sampling.best_of < sampling.n:
        raise RequestError(f"best_of: {sampling.best_of} is less than n ({sampling.n})")
    if sampling.max_thinking_tokens is not None and sampling.end_thinking_token_id is None:
        raise RequestError("max_thinking_tokens: end_thinking_token_id is missing: which token ends thinking?")
    if sampling.truncate_prompt_tokens == 0:
        raise RequestError(
            "truncate_prompt_tokens: expected at least 1 token, or -1 for as many as the model takes; got 0"
        )
    if sampling.stop and not sampling.detokenize:
        raise RequestError(
            "stop and detokenize: stop strings are looked for in text, and detokenize=false makes none; use "
            "stop_token_ids"
        )
    num_stop_chars = sum(map(len, sampling.stop))
    if num_stop_chars > MAX_STOP_CHARS:
        raise RequestError(f"stop: {num_stop_chars} characters together; the most allowed is {MAX_STOP_CHARS}")
    if sampling.use_beam_search or given.keys() & _BEAM_KEYS:
        return _checked_search(sampling, given)
    for name in ("n", "best_of"):
        if sampling.greedy and (getattr(sampling, name) or 1) > 1:
            raise RequestError(
                f"{name}: {getattr(sampling, name)} with temperature 0: every sequence would be the same"
            )
    return sampling


_BEAM_KEYS = frozenset({"beam_width", "length_penalty", "early_stopping"})
_NOT_WITH_BEAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "best_of",
    "stop",
)


def _checked_search(sampling: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """A beam search is greedy about whole answers; with one beam it is greedy about tokens."""
    plain = SamplingParams(temperature=0.0)
    asked = sorted(_BEAM_KEYS & given.keys())
    if not sampling.use_beam_search:
        # as some clients send every key they know
        if all(getattr(sampling, name) == getattr(plain, name) for name in asked):
            return sampling
        raise RequestError(f"{asked[0]}: only with use_beam_search")
    if sampling.beam_width is None:
        raise RequestError(f"use_beam_search: beam_width is missing, 1 to {MAX_BEAM_WIDTH}")
    if sampling.n > sampling.beam_width:
        raise RequestError(f"n: {sampling.n} is more than beam_width ({sampling.beam_width})")
    for name in _NOT_WITH_BEAMS:
        value = getattr(sampling, name)
        if name in given and value != getattr(plain, name) and not (name == "top_k" and value == -1):
            raise RequestError(f"use_beam_search and {name}: beams follow the model's own probabilities alone")
    if sampling.max_thinking_tokens is not None:
        raise RequestError("use_beam_search and max_thinking_tokens: beams follow the model's own probabilities alone")
    if sampling.guided:
        raise RequestError(f"use_beam_search and {sampling.grammars[0].key}: beams follow no grammar")
    if sampling.logprobs:
        raise RequestError(
            f"use_beam_search and logprobs: only the chosen tokens' are known; expected 0, got {sampling.logprobs}"
        )
    if sampling.beam_width == 1:
        plain_keys = {name: getattr(plain, name) for name in ("use_beam_search", *_BEAM_KEYS)}
        return msgspec.structs.replace(sampling, temperature=0.0, **plain_keys)
    return msgspec.structs.replace(sampling, temperature=0.0)


def _check_lora_name(name: str) -> None:
    """A plain name of a folder: nothing that leads elsewhere, or that no terminal shows."""
    if name.startswith(".") or not name.isprintable() or "/" in name or "\\" in name:
        raise RequestError(
            f"lora_name: {_shorten(repr(name))} is not a plain name: it must not begin with '.' or hold '/', "
            "'\\' or control characters"
        )


def _require_finite(sampling: SamplingParams) -> None:
    """Strings such as "nan" become numbers in coercion, and no range check refuses NaN."""
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "request_deadline_seconds",
        "length_penalty",
    ):
        value = getattr(sampling, name)
        if value is not None and not math.isfinite(value):
            raise RequestError(f"{name}: {value} is not a finite number")
    for token_id, bias in sampling.logit_bias.items():
        if not math.isfinite(bias):
            raise RequestError(f"logit_bias: {bias} for token {token_id} is not a finite number")


def _explain(message: str, given: Mapping[str, Any]) -> str:
    """msgspec says "Expected `float` >= 0.0 - at `$.temperature`"; the caller reads "temperature: expected float >=
    0.0, got -1".
    """
    what = message.split(" - at `")[0]
    found = re.search(r"\$\.(\w+)(?:\[(\d+)\]`$)?", message)
    name = found[1] if found else "sampling_parameters"
    what = what.replace("`", "").replace("Expected", "expected", 1)
    value = given.get(name)
    if found and found[2] and value is not None:
        return f"{name}: {what}, got {_shorten(repr(list(value)[int(found[2])]))} as entry {found[2]}"
    if isinstance(value, dict) and ("[...]" in message or "`key`" in message):
        return f"{name}: {what}, got {_shorten(repr(_culprit(name, value)))}"
    if isinstance(value, (list, tuple, dict)):
        return f"{name}: {what}, got {len(value)} entries"
    return f"{name}: {what}, got {_shorten(repr(value))}"


def _culprit(name: str, entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """The first entry that is refused also alone: msgspec does not say which it was."""
    for key, value in entries.items():
        try:
            msgspec.convert({name: {key: value}}, SamplingParams, strict=False)
        except (msgspec.ValidationError, OverflowError):
            return {key: value}
    return {}


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
