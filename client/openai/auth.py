"""The API key that callers must send."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers

from paged_client.openai.errors import RefusalError

OPEN_PATHS = ("/health", "/v1/health", "/ping")  # load balancers have no key


def check_key(path: str, headers: Headers, key: str) -> None:
    """Compares the caller's key with ours in a time that does not depend on where they differ. An empty key lets
    everybody in.

    Raises:
        RefusalError: 401.
    """
    if not key or path in OPEN_PATHS:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")  # Anthropic's clients send it so
    if not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise RefusalError("no valid API key: send the header Authorization: Bearer KEY", 401, code="invalid_api_key")


def usable_key(given: str) -> str:
    """A key without the white space around it, as files and shells add it; "" for none.

    Raises:
        ValueError: no client could send it in a header.
    """
    key = given.strip()
    if given and not key:
        raise ValueError("the API key is white space only")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "the API key has characters that a header cannot hold: only printable ASCII characters can be sent"
        )
    return key
