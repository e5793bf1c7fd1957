"""What every body must be before anything else is looked at: something that can be written as JSON again, in UTF-8.

Python's reader takes more: half a character (a lone surrogate), numbers that are none (NaN, or beyond a double), lists
in lists until its stack is full. None of these can be sent on, stored or answered with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from paged_client.openai.errors import RefusalError

MAX_KEYS = 1024  # of a body, and of logit_bias; the server takes fewer biases
_LONGEST_STEP = 64  # characters of a key in an error
_MOST_STEPS = 20


class ReadableBody(BaseModel):
    """A request's JSON object. Keys that are not declared stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, body: Any) -> Any:
        """The same.

        Raises:
            RefusalError: what cannot be read, by its place; a mistake would be noted for each of a million keys, too.
        """
        if isinstance(body, dict):
            _check_keys(body)
            if fault(body):
                raise _refusal(body)
        return body


def _check_keys(body: dict[str, Any]) -> None:
    bias = body.get("logit_bias")
    for param, members in ((None, body), ("logit_bias", bias)):
        if isinstance(members, dict) and len(members) > MAX_KEYS:
            reason = f"{param or 'the body'}: {len(members)} keys; the most allowed is {MAX_KEYS}"
            raise RefusalError(reason, param=param)


def fault(value: Any) -> str:
    """What is wrong somewhere in it; "": nothing is."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "half a character (a lone surrogate), which is no Unicode text"
    except RecursionError:
        return "a list or object that is nested too deeply"
    except ValueError:
        return "a number that is not finite: NaN, or beyond a double"
    return ""


def _refusal(body: dict[str, Any]) -> RefusalError:
    """Names the innermost member that is wrong; of what is too deep, the body's field."""
    steps: list[str] = []
    value, wrong = body, fault(body)
    while len(steps) < _MOST_STEPS and not (steps and "deeply" in wrong):
        found = next(((step, member, fault(member)) for step, member in _members(value) if fault(member)), None)
        if found is None:
            break
        step, value, wrong = found
        steps.append(str(step)[:_LONGEST_STEP])
    param = ".".join(steps) or None
    return RefusalError(f"{param or 'the body'}: it holds {wrong}", param=param)


def _members(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()
