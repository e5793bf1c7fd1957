"""What talks to a running server, and the `paged` command."""

from paged_client.answers import Answer, Delta, TokenLogprob, Usage
from paged_client.async_client import AsyncPagedClient, AsyncStream
from paged_client.client import PagedClient, Stream
from paged_client.errors import (
    AnswerTimeoutError,
    InvalidRequestError,
    PagedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
    UnsupportedError,
)
from paged_client.question import in_trace

__all__ = [
    "Answer",
    "AnswerTimeoutError",
    "AsyncPagedClient",
    "AsyncStream",
    "Delta",
    "InvalidRequestError",
    "PagedClient",
    "PagedError",
    "RequestCancelledError",
    "ServerError",
    "Stream",
    "TokenLogprob",
    "UnavailableError",
    "UnknownModelError",
    "UnreachableError",
    "UnsupportedError",
    "Usage",
    "in_trace",
]
