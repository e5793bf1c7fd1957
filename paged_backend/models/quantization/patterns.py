"""Names of modules as quantisation configs list them: whole names, parts of names, globs, and regular expressions after
"re:".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from paged_backend.errors import EngineError

_GLOB = re.compile(r"[*?\[]")


def strings_of(value: Any, key: str) -> list[str]:
    """A list of names in a config; null is none.

    Raises:
        EngineError: it is no list of strings.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise EngineError(f"quantization_config: {key}: expected a list of names, got {str(value)[:80]}")
    return value


def any_of(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether one of the patterns means a module of that name, or one that it lies in.

    re:EXPRESSION matches from the beginning of the name, as compressed-tensors has it. A glob's * goes across dots.
    Anything else is a name or a part of one between dots: "mlp.gate" means model.layers.3.mlp.gate, and not
    model.layers.3.mlp.gate_proj.

    Raises:
        EngineError: an expression is broken.
    """
    expressions, globs, names = [], [], []
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expressions.append(re.compile(pattern[3:]))
            except re.error as error:
                raise EngineError(f"quantization_config: {pattern[:80]} is no regular expression: {error}") from None
        elif _GLOB.search(pattern):
            globs.append(pattern)
        else:
            names.append(f".{pattern}.")

    def matches(module: str) -> bool:
        dotted = f".{module}."
        if any(name in dotted for name in names) or any(expression.match(module) for expression in expressions):
            return True
        parts = module.split(".")
        return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1) for pattern in globs)

    return matches
