"""Why a request was not answered, in OpenAI's words: a status, and `{"error": {"message", "type", "param", "code"}}`.

OpenAI's client libraries try again after 408, 409, 429 and 500 or more. What may succeed later gets such a status,
everything else one that ends the matter. A full queue is 503, not 429: 429 says that this caller asks too much, and it
may be another's load; OpenAI's own "overloaded" is 503, and load balancers take it as the advice to ask another
backend.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from paged_client.errors import (
    AnswerTimeoutError,
    InvalidRequestError,
    PagedError,
    RequestCancelledError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
)

log = logging.getLogger("paged.openai")

RETRY_AFTER_SECONDS = 1
_TOO_LONG = re.compile(r"the prompt has \d+ tokens")
_UNKNOWN_KEY = re.compile(r"unknown (?:sampling|request) parameter '[^']*'")


class RefusalError(Exception):
    """A request that is not answered. `param`: which field of the body is wrong, as far as that is known."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(_encodable(message))
        self.status = status
        self.param = None if param is None else _encodable(param)
        self.code = code

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}


def _encodable(text: str) -> str:
    """JSON may spell half a surrogate pair, which no response can carry."""
    return text.encode(errors="replace").decode()


def unknown_model(name: str) -> RefusalError:
    return RefusalError(f"the model '{name[:200]}' does not exist", 404, param="model", code="model_not_found")


def refusal_of(error: PagedError, params: Mapping[str, str]) -> RefusalError:
    """A server's error as a RefusalError. params: the server's names of fields → those of the body, where they
    differ.
    """
    message = str(error)
    match error:
        case InvalidRequestError():
            return _invalid(message, error.field, params)
        case UnreachableError():  # its address is not the caller's business
            log.warning("%s", message)
            return RefusalError("the server cannot be reached", 503, code="overloaded")
        case UnavailableError():
            return RefusalError(message, 503, code="overloaded")
        # it had one when this process started, and may have it again: only a name that was never served is a 404
        case UnknownModelError():
            return RefusalError(f"the server has no such model now: {message}", 503, param="model", code="not_ready")
        case AnswerTimeoutError() | RequestCancelledError():
            return RefusalError(message, 504, code="timeout")
        case _:
            return RefusalError(message, 500)


def _invalid(message: str, field: str, params: Mapping[str, str]) -> RefusalError:
    if _TOO_LONG.match(message):
        return RefusalError(
            message, param=params.get("input_ids", params.get("messages", "messages")), code="context_length_exceeded"
        )
    param = params.get(field, field)
    if _UNKNOWN_KEY.match(message):
        return RefusalError(
            f"{param}: the server's model does not support it", param=param, code="unsupported_parameter"
        )
    if param != field:
        message = re.sub(rf"^{field}(\.\w+)*: ", f"{param}: ", message)
    if param == "model":  # of what it named, only an adapter is for the server to refuse
        return RefusalError(message, 404, param=param, code="model_not_found")
    return RefusalError(message, param=param or None)


def refusal_of_body(errors: Sequence[Mapping[str, Any]]) -> RefusalError:
    """What pydantic found wrong with a body; the first of it. A field of several types has an error for each, whose
    `loc` go on with the types' names: what they have in common is the field's path.
    """
    first = errors[0]
    where = first["loc"][1:]
    if first["type"] == "json_invalid":
        return RefusalError("the body is not valid JSON")
    if not where:
        ours = first["type"] == "value_error"
        return RefusalError(first["msg"].removeprefix("Value error, ") if ours else "the body must be a JSON object")
    if first["type"] == "missing":
        name = ".".join(str(step) for step in where)
        return RefusalError(f"{name}: missing", param=name, code="missing_required_parameter")
    of_field = [error for error in errors if error["loc"][1:2] == (where[0],)]
    path = ".".join(
        str(steps[0])
        for steps in takewhile(
            lambda steps: len(set(steps)) == 1, zip(*(error["loc"][1:] for error in of_field), strict=False)
        )
    )
    reasons = dict.fromkeys(
        error["msg"].removeprefix("Value error, ").replace("Input should be", "expected") for error in of_field
    )
    return RefusalError(f"{path}: {', or '.join(reasons)}", param=path)
