"""Why a request failed, by Triton Server's codes: one exception a code."""

from __future__ import annotations

import re

_CODED = re.compile(r"(?:\[request id: [^\]]*\] )?(?P<code>[A-Z_]{6,}): (?P<text>.*)", re.DOTALL)
_FIELD = re.compile(
    r"(?P<named>\w+)(?:\.\w+)*: |unknown (?:sampling|request) parameter '(?P<unknown>[^']*)'|unexpected "
    r"inference input '(?P<input>[^']*)'"
)
# What the server itself says before the model sees a request: a gRPC stream carries no code of it.
_SERVERS_OWN = (
    ("NOT_FOUND", re.compile(r"unknown model|is not found|has no available versions")),
    ("UNAVAILABLE", re.compile(r"is not (?:at )?ready|stopping|stopped accepting|exceeds maximum queue size")),
    ("INVALID_ARGUMENT", re.compile(r"inference input|unexpected shape|expected \d+ inputs|parse", re.IGNORECASE)),
)


class PagedError(Exception):
    """A request failed. `str(error)` is a sentence for people."""


class InvalidRequestError(PagedError):
    """INVALID_ARGUMENT: the request must be changed. `field` is the input, parameter or sampling key that is wrong, ""
    if it is not known.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = _FIELD.match(message)
        self.field: str = next((name for name in found.groups() if name), "") if found else ""


class UnsupportedError(InvalidRequestError):
    """UNIMPLEMENTED: this server cannot do what was asked for, however often it is asked; its text says what is
    missing.
    """


class UnknownModelError(PagedError):
    """NOT_FOUND: the server has no model of that name."""


class UnavailableError(PagedError):
    """UNAVAILABLE: the queue is full, the wait was too long, or the server is stopping. The same request may succeed
    later.
    """


class UnreachableError(UnavailableError):
    """Nobody answers at the URL, or the connection broke."""


class RequestCancelledError(PagedError):
    """CANCELLED: the server ended the request, at a deadline of its own as a rule."""


class AnswerTimeoutError(PagedError, TimeoutError):
    """The answer was not complete within `timeout`, or the next piece did not come within `delta_timeout`. The request
    is cancelled.
    """


class ServerError(PagedError):
    """INTERNAL, or anything else that is not the caller's to change."""


_KINDS: dict[str, type[PagedError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNIMPLEMENTED": UnsupportedError,
    "NOT_FOUND": UnknownModelError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": RequestCancelledError,
    "DEADLINE_EXCEEDED": AnswerTimeoutError,
}
_HTTP_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 499: "CANCELLED", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE"}


def error_of(message: str, *, code: str = "", http_status: int = 0) -> PagedError:
    """The exception for what a server said.

    message: may begin with a code, as paged_llm writes it on request. code: gRPC's name of a code, if the transport
        brought one.
    """
    coded = _CODED.fullmatch(message)
    if coded and (coded["code"] in _KINDS or coded["code"] == "INTERNAL"):
        code, message = coded["code"], coded["text"]
    elif not code:
        code = _HTTP_CODES.get(http_status, "")
        if http_status in (0, 400):  # the server's own words: HTTP says 400 for most of them
            code = next((name for name, pattern in _SERVERS_OWN if pattern.search(message)), code)
    return _KINDS.get(code, ServerError)(message)
