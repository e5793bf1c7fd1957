"""Keys of a body that mean nothing here: most are left out with a warning, and one that looks like a mistake is
refused.

OpenAI and every other server add keys all the time, and clients send whatever they know. A caller who meant another key
must hear of it all the same: `max_token` is not ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel
from starlette.responses import Response

from paged_client.openai.errors import RefusalError
from paged_client.openai.readable import MAX_KEYS

WARNING_HEADER = "x-paged-warning"
_NEAR = 0.85  # of difflib's ratio: one or two letters of a name
_MOST_NAMED = 10
_LONGEST_NAME = 64
# Names of other servers that look like one of ours and are none.
_OTHERS = frozenset(
    ["models", "top_a", "include_reasoning", "return_token_ids", "guided_decoding_backend", "stop_sequences"]
)


def unused_keys(body: BaseModel, strict: bool) -> list[str]:
    """Names of the keys that were given a value and have no effect. Null is not a value.

    strict: refuse them instead.

    Raises:
        RefusalError: a key is refused, by its name.
    """
    unused = list(_unused(body, ""))
    for name, nearest in unused:
        if strict or nearest:
            hint = f"; did you mean '{nearest}'?" if nearest else ""
            raise RefusalError(f"unknown parameter: '{name}'{hint}", param=name, code="unknown_parameter")
    names = [name for name, _ in unused]
    if getattr(body, "spaces_between_special_tokens", None) is False:
        names.append("spaces_between_special_tokens")
    if getattr(body, "verbosity", None) is not None:
        names.append("verbosity")
    return names


def refuse_if_strict(left_out: Sequence[str], strict: bool) -> None:
    """left_out: places in a body of what is not shown to the model, each with its type at the end.

    Raises:
        RefusalError: there is one, by its place.
    """
    if strict and left_out:
        where, _, kind = left_out[0].rpartition(".")
        raise RefusalError(f"{where}.type: '{kind}' is not to be had here", param=f"{where}.type")


def with_warning(response: Response, names: list[str]) -> Response:
    if names:
        response.headers[WARNING_HEADER] = warning_of(names)
    return response


def warning_of(names: list[str]) -> str:
    """The header's text."""
    printable = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII) for name in names[:_MOST_NAMED]]
    return f"ignored: {', '.join(printable)}{' ...' if len(names) > _MOST_NAMED else ''}"


def _unused(body: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Each unknown key that has a value, and the known one that it looks like.

    Raises:
        RefusalError: there are too many to look at.
    """
    known, given = type(body).model_fields, body.model_extra or {}
    if len(given) > MAX_KEYS:
        where = prefix.removesuffix(".")
        raise RefusalError(f"{where}: {len(given)} keys; the most allowed is {MAX_KEYS}", param=where)
    for name, value in given.items():
        if value is not None:
            near = [] if name in _OTHERS else difflib.get_close_matches(name[:_LONGEST_NAME], known, 1, _NEAR)
            yield prefix + name[:_LONGEST_NAME], next((prefix + nearest for nearest in near), "")
    for name in known:
        member = getattr(body, name)
        if isinstance(member, BaseModel):
            yield from _unused(member, f"{prefix}{name}.")
