"""A caller's tensors and parameters to a Request. A value is taken from the first that has it: tensor,
sampling_parameters, request parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import msgspec
import numpy as np

from paged_backend.errors import RequestError
from paged_backend.frontend.embeddings import check_no_embedding_keys, embedding_sampling, vllm_request
from paged_backend.frontend.generation_defaults import KEY as GENERATION_DEFAULTS
from paged_backend.frontend.generation_defaults import GenerationDefaults
from paged_backend.frontend.tensor_values import (
    Tensor,
    Tensors,
    as_bytes,
    json_element,
    only_element,
    read_json,
    read_switch,
    read_words,
    text_element,
)
from paged_backend.frontend.unknown_keys import without_foreign, without_unknown
from paged_backend.request import (
    Chat,
    Outputs,
    Request,
    SamplingParams,
    Task,
    parse_sampling,
)
from paged_backend.tracing import TRACE_HEADERS, trace_headers

MAX_INPUT_IDS = 4_194_304  # that are read at all; the model's own limit is known later

_OUTPUT_SWITCHES = {f"return_{name}": name for name in Outputs.__struct_fields__}
_SAMPLING_TENSORS = ("max_tokens", "temperature", "top_p", "top_k", "seed")
_WORD_TENSORS = {"stop_words": "stop", "bad_words": "bad_words"}
_PROMPTS = ("text_input", "input_ids", "messages")
_ANSWER = "answer_ids"
_CHAT_SWITCHES = ("add_generation_prompt", "continue_final_message")
_TEMPLATE_KWARGS = "chat_template_kwargs"
_NOT_SERVED = {"image": "this model reads text alone"}  # inputs of NVIDIA's vLLM backend
_VLLM_EMBEDDING = "embedding_request"  # another of its inputs
_ERROR_CODE_SWITCH = "return_error_code"
_NO_DEFAULTS = GenerationDefaults()
_HEALTH_SWITCH = "health_check"
_SWITCHES = ("stream", "exclude_input_in_output", *_CHAT_SWITCHES, *_OUTPUT_SWITCHES)
# Names that the server itself gives a meaning, or that its clients send along.
_RESERVED = frozenset(
    [
        "id",
        "priority",
        "timeout",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "headers",
        "binary_data_output",
        "classification",
        "unary",
        "content_length",
    ]
).union(TRACE_HEADERS)


def read_request(
    tensors: Tensors, parameters: str, arrival: float, defaults: GenerationDefaults = _NO_DEFAULTS
) -> Request:
    """Checks shapes, types and values.

    tensors: by name; BYTES tensors hold bytes objects. parameters: the request's parameters as a JSON object, as the
    server writes them. defaults: for the sampling keys that the request leaves open.

    Raises:
        RequestError: names the tensor, key or parameter, and what is allowed.
    """
    given, trace = _read_parameters(parameters)
    task: Task = _read_task(tensors) if "task" in tensors else "generate"
    if task == "embed" or (_VLLM_EMBEDDING in tensors and tensors[_VLLM_EMBEDDING].size):
        return msgspec.structs.replace(_embed_request(tensors, given, arrival), trace=trace)
    if task != "generate":
        return _task_request(task, tensors, given, arrival)
    outputs = Outputs(**{name: bool(read_switch(tensors, given, switch)) for switch, name in _OUTPUT_SWITCHES.items()})
    stream = bool(read_switch(tensors, given, "stream"))
    exclude_prompt = read_switch(tensors, given, "exclude_input_in_output")
    if stream and exclude_prompt is False:
        raise RequestError(
            "exclude_input_in_output: false is not possible with stream: the prompt cannot be part of a streamed answer"
        )
    for name, reason in _NOT_SERVED.items():
        if name in tensors and tensors[name].size:
            raise RequestError(f"{name}: not served: {reason}")
    name = _prompt_name(tensors)
    options = _read_options(tensors, given)
    template_kwargs = _template_kwargs(name, tensors.get(_TEMPLATE_KWARGS), options.pop(_TEMPLATE_KWARGS, None))
    check_no_embedding_keys(options)
    sampling = _read_sampling(defaults.with_defaults(options), outputs)
    if stream and (sampling.best_of or 1) > sampling.n:
        raise RequestError(
            f"best_of: {sampling.best_of} is more than n ({sampling.n}) and not possible with stream: who is "
            "best is known at the end"
        )
    if stream and sampling.n > 1:
        outputs = msgspec.structs.replace(outputs, sequence_index=True)
    if sampling.prompt_logprobs is not None:
        outputs = msgspec.structs.replace(outputs, prompt_logprobs=True)
    if not sampling.detokenize:
        outputs = msgspec.structs.replace(outputs, output_ids=True)  # there is nothing else
    return Request(
        text=text_element(name, tensors[name]) if name == "text_input" else None,
        input_ids=_read_ids(name, tensors[name]) if name == "input_ids" else None,
        chat=_read_chat(tensors, given, template_kwargs) if name == "messages" else None,
        sampling=sampling,
        outputs=outputs,
        stream=stream,
        # a caller wrote no such text
        prepend_prompt=exclude_prompt is False if name == "messages" else not stream and not exclude_prompt,
        cache_salt=_cache_salt(given),
        answer_ids=_read_answer(tensors, sampling),
        arrival=arrival,
        trace=trace,
    )


def _read_task(tensors: Tensors) -> Task:
    task = text_element("task", tensors["task"])
    for known in get_args(Task):
        if task == known:
            return cast(Task, known)
    raise RequestError(f"task: expected {', '.join(get_args(Task))}, got {task[:80]!r}")


def _task_request(task: Task, tensors: Tensors, given: Mapping[str, Any], arrival: float) -> Request:
    """One that needs no engine, and of whose options only those of the prompt and the error's form mean anything."""
    name = "" if task == "describe" else _prompt_name(tensors)
    if task == "detokenize" and name != "input_ids":
        raise RequestError(f"{name}: task detokenize takes input_ids")
    options = _read_options(tensors, given)
    template_kwargs = _template_kwargs(name, tensors.get(_TEMPLATE_KWARGS), options.pop(_TEMPLATE_KWARGS, None))
    return Request(
        text=text_element(name, tensors[name]) if name == "text_input" else None,
        input_ids=_read_ids("input_ids", tensors[name]) if name == "input_ids" else None,
        chat=_read_chat(tensors, given, template_kwargs) if name == "messages" else None,
        sampling=_read_sampling(options, Outputs()),
        outputs=Outputs(
            output_ids=task == "tokenize",
            num_input_tokens=task == "tokenize",
            finish_reason=bool(read_switch(tensors, given, "return_finish_reason")),
            error_code=bool(read_switch(tensors, given, _ERROR_CODE_SWITCH)),
        ),
        stream=False,
        prepend_prompt=False,
        arrival=arrival,
        task=task,
    )


def _embed_request(tensors: Tensors, given: Mapping[str, Any], arrival: float) -> Request:
    """One whose answer is the prompt's embedding; the prompt may come in the vLLM backend's own input."""
    options, text, ids = _read_options(tensors, given), None, None
    template_kwargs: dict[str, Any] = {}
    as_text = _VLLM_EMBEDDING in tensors and bool(tensors[_VLLM_EMBEDDING].size)
    if as_text:
        if others := [name for name in _PROMPTS if name in tensors]:
            raise RequestError(f"{_VLLM_EMBEDDING} and {others[0]}: send one of them, not both")
        prompt, own = vllm_request(json_element(_VLLM_EMBEDDING, tensors[_VLLM_EMBEDDING]))
        name, options = "", {**options, **own}
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, np.array(prompt, np.int64))
    else:
        name = _prompt_name(tensors)
        template_kwargs = _template_kwargs(name, tensors.get(_TEMPLATE_KWARGS), options.pop(_TEMPLATE_KWARGS, None))
        text = text_element(name, tensors[name]) if name == "text_input" else None
        ids = _read_ids(name, tensors[name]) if name == "input_ids" else None
    outputs = Outputs(**{name: bool(read_switch(tensors, given, switch)) for switch, name in _OUTPUT_SWITCHES.items()})
    return Request(
        text=text,
        input_ids=ids,
        chat=_read_chat(tensors, given, template_kwargs) if name == "messages" else None,
        sampling=embedding_sampling(options),
        outputs=msgspec.structs.replace(outputs, logprobs=False, prompt_logprobs=False, cumulative_logprob=False),
        stream=False,
        prepend_prompt=False,
        cache_salt=_cache_salt(given),
        arrival=arrival,
        task="embed",
        embedding_as_text=as_text,
    )


def wants_error_code(parameters: str) -> bool:
    """Whether an error's text is to begin with its code, "UNAVAILABLE: …": the only way in which a gRPC stream can
    carry one.

    Asked before the request is read, which may fail, so whatever cannot be understood means no.
    """
    return _is_switched_on(_ERROR_CODE_SWITCH, parameters)


def asks_for_health(parameters: str) -> bool:
    """Whether nothing is asked but if the model would answer: no prompt is looked at."""
    return _is_switched_on(_HEALTH_SWITCH, parameters)


def _is_switched_on(name: str, parameters: str) -> bool:
    if name not in parameters:
        return False
    try:
        return read_switch({}, read_json("parameters", as_bytes("parameters", parameters)), name) is True
    except RequestError:
        return False


def id_parameter(parameters: str) -> str:
    """The parameter `id`, as the HTTP endpoint passes on the member of that name; "" if there is none."""
    if '"id"' not in parameters:
        return ""
    value = read_json("parameters", as_bytes("parameters", parameters)).get("id", "")
    return value if isinstance(value, str) else str(value)[:128]


def _prompt_name(tensors: Tensors) -> str:
    names = [name for name in _PROMPTS if name in tensors]
    if not names:
        raise RequestError("text_input: missing; send the prompt as text_input, input_ids or messages")
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)}: send one of them, not {'both' if len(names) == 2 else 'all'}")
    return names[0]


def _read_ids(name: str, ids: Tensor) -> Tensor:
    """A copy: the tensor is in memory of the server's."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError(f"{name}: expected a list of integers, got shape {list(ids.shape)}")
    if len(ids) > MAX_INPUT_IDS:
        raise RequestError(f"{name}: {len(ids)} token ids; the most allowed is {MAX_INPUT_IDS}")
    return ids.copy()


def _template_kwargs(prompt: str, tensor: Tensor | None, option: Any) -> dict[str, Any]:
    """The chat template's variables, as a tensor or a sampling key."""
    kwargs = option if tensor is None else only_element(_TEMPLATE_KWARGS, tensor)
    if kwargs is None:
        return {}
    if prompt != "messages":
        raise RequestError(f"{_TEMPLATE_KWARGS}: only with messages")
    if isinstance(kwargs, (str, bytes)):
        return read_json(_TEMPLATE_KWARGS, as_bytes(_TEMPLATE_KWARGS, kwargs))
    if not isinstance(kwargs, dict):
        raise RequestError(f"{_TEMPLATE_KWARGS}: expected a JSON object, got {str(kwargs)[:80]!r}")
    return kwargs


def _read_answer(tensors: Tensors, sampling: SamplingParams) -> Tensor | None:
    """The answer's first tokens, if another server has sent them; None: there are none."""
    if _ANSWER not in tensors or not tensors[_ANSWER].size:
        return None
    if max(sampling.n, sampling.best_of or 1) > 1 or sampling.use_beam_search:
        raise RequestError(f"{_ANSWER}: only with one sequence (n = 1, best_of = 1, no beams): whose tokens are they?")
    return _read_ids(_ANSWER, tensors[_ANSWER])


def _read_chat(tensors: Tensors, given: Mapping[str, Any], template_kwargs: Mapping[str, Any]) -> Chat:
    opens, continues = (read_switch(tensors, given, name) for name in _CHAT_SWITCHES)
    if opens and continues:
        raise RequestError(
            "add_generation_prompt and continue_final_message: the answer opens a new turn or continues the last "
            "one, not both"
        )
    tools = tensors.get("tools")
    return Chat(
        messages=text_element("messages", tensors["messages"]),
        tools=None if tools is None else text_element("tools", tools),
        add_generation_prompt=not continues if opens is None else opens,
        continue_final_message=bool(continues),
        template_kwargs=template_kwargs,
    )


def _read_parameters(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The request's parameters that mean something here, and the headers among them that say in the course of which
    span it was sent.
    """
    given = read_json("parameters", as_bytes("parameters", text)) if text else {}
    trace = trace_headers(given)
    given = {
        name: value for name, value in given.items() if name.lower() not in _RESERVED and not name.startswith("triton_")
    }
    known = (
        *SamplingParams.__struct_fields__,
        *_WORD_TENSORS,
        *_SWITCHES,
        _TEMPLATE_KWARGS,
        GENERATION_DEFAULTS,
        "cache_salt",
    )
    return without_unknown(given, known), trace


def _read_options(tensors: Tensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling keys that have a value."""
    options = {
        _WORD_TENSORS.get(name, name): value
        for name, value in given.items()
        if name not in _SWITCHES and name != "cache_salt"
    }
    text = tensors.get("sampling_parameters")
    if text is not None:
        options.update(without_foreign(json_element("sampling_parameters", text)))
    for name in _SAMPLING_TENSORS:
        if name in tensors:
            options[name] = only_element(name, tensors[name])
    for tensor, name in _WORD_TENSORS.items():
        if tensor in tensors:
            options[name] = read_words(tensor, tensors[tensor])
    return options


def _read_sampling(options: dict[str, Any], outputs: Outputs) -> SamplingParams:
    """options: changed."""
    ranks = options.get("best_of") is not None  # by cumulative logprob
    if options.get("logprobs") is None and (outputs.logprobs or outputs.cumulative_logprob or ranks):
        options["logprobs"] = 0
    if options.get("prompt_logprobs") is None and outputs.prompt_logprobs:
        options["prompt_logprobs"] = 0
    return parse_sampling(options)


def _cache_salt(given: Mapping[str, Any]) -> str:
    salt = given.get("cache_salt", "")
    if not isinstance(salt, str) or len(salt) > 1024:
        raise RequestError("cache_salt: expected a string of at most 1024 characters")
    return salt
