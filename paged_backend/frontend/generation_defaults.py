"""Sampling that a checkpoint's makers recommend, for requests that do not say what they want."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paged_backend.errors import RequestError

KEY = "generation_defaults"  # a request's own say, beside its sampling keys


@dataclass(frozen=True)
class GenerationDefaults:
    """`values` by sampling key, of the checkpoint's generation_config.json; `on`: also for requests that do not ask for
    them.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    on: bool = False

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A request's sampling keys, with recommended ones for those that it leaves open.

        Beams follow the model's own probabilities: of these values a beam search takes max_tokens alone.

        Raises:
            RequestError: the request's own say is neither true nor false.
        """
        given = {key: value for key, value in options.items() if key != KEY and value is not None}
        wanted = options.get(KEY)
        if not (self.on if wanted is None else _switch(wanted)):
            return given
        beams = given.get("use_beam_search") in (True, 1, "true", "True", "1")
        values = {key: value for key, value in self.values.items() if key == "max_tokens" or not beams}
        if "min_tokens" in given:
            values.pop("max_tokens", None)  # nobody is refused for a number that somebody else chose
        return {**values, **given}


def _switch(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise RequestError(f"{KEY}: expected true or false, got {str(value)[:80]!r}")
