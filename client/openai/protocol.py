"""What may be asked: OpenAI's request bodies, and vLLM's keys beside them.

A key that is not declared here is left in `model_extra`; what becomes of it is decided in unknown_keys.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from paged_client.openai.readable import ReadableBody

MAX_PROMPTS = 2048  # in one request, as OpenAI has it
_FIRST = Field(fail_fast=True)  # a list of a million wrong things is one mistake, not a million
_FIRST_OF_SOME = Field(fail_fast=True, min_length=1)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], _FIRST_OF_SOME]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: bool = False
    # vLLM's: with include_usage, every chunk says how many tokens there are so far
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # nothing is padded


class SamplingKeys(ReadableBody):
    """Handed to the server under their own names, which checks the values."""

    n: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], _FIRST] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], _FIRST] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[str], _FIRST] | None = None
    allowed_token_ids: Annotated[list[int], _FIRST] | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    # the server's own
    priority_level: int | None = None
    request_deadline_seconds: float | None = None
    skip_prefix_cache: bool | None = None
    speculation: Literal["off"] | None = None
    lora_name: str | None = None
    # what a body leaves open is as the checkpoint recommends; a chat's is unless it says false
    generation_defaults: bool | None = None
    # what the answer must match
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], _FIRST] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None


class Body(SamplingKeys):
    """What both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    cache_salt: str | None = None  # vLLM's: requests with different salts share no pages
    best_of: int | None = None
    # vLLM's: part of the answer's id
    request_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")] | None = None
    priority: int | None = None  # vLLM's name of priority_level
    # vLLM's, which here are as they are: another value is not followed, and the answer says so.
    spaces_between_special_tokens: bool | None = None
    # They say something about the caller, or how to bill: the answer is the same without.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class TokenizeBody(ReadableBody):
    """POST /tokenize, vLLM's: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], _FIRST_OF_SOME] | None = None
    tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(ReadableBody):
    """POST /detokenize, vLLM's."""

    model: str | None = None
    tokens: TokenIds


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str], _FIRST_OF_SOME] | Annotated[list[TokenIds], _FIRST_OF_SOME]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], _FIRST_OF_SOME]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: Effort | None = None  # for the template
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None  # vLLM's; False: it is left out
    max_thinking_tokens: Annotated[int, Field(ge=0)] | None = None  # then the end of thinking is forced
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None  # vLLM's name of it
    prediction: Any = None  # a hint for speed
    modalities: Annotated[list[Literal["text"]], _FIRST] | None = None
    continue_final_message: bool = False  # vLLM's
    add_generation_prompt: bool | None = None  # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's: the template's variables, such as enable_thinking
    verbosity: Any = None  # a hint that is not followed, and the answer says so
    # Refused if given: the answer would be another.
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    chat_template: Any = None  # vLLM's
    documents: Any = None  # vLLM's
