"""Kernels whose launches cost the host little: `@kernel` in the place of `@triton.jit` on what a launcher starts; and
programmatic dependent launch.

`triton.jit` looks at every argument of every launch to find out which compiled variant it needs, 40 to 70 us for a
kernel of twenty arguments; a step without a graph makes hundreds of launches. Here a launch is looked up by what a
variant depends on and nothing else, and goes to the compiled kernel directly.

Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): a
kernel that is launched with the constant LAUNCH_PDL may begin while the kernel before it in the stream still runs. It
must not read what that kernel writes, nor write what it reads, before `pdl_wait`; with `pdl_release` it lets the next
kernel begin in turn. Every kernel waits on every path, since its end stands for that of all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

_LARGEST_INT32 = 2**31 - 1
_STAGES = 3  # of a pipeline, where a launch does not say


@triton.jit
def pdl_wait(LAUNCH_PDL: tl.constexpr):
    """Wait until the kernels before this one are complete and what they wrote can be read."""
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_release(LAUNCH_PDL: tl.constexpr):
    """Let the next kernel begin as soon as there is room on the device. It must not be one that writes what this one
    reads before its own `pdl_wait`.
    """
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_begin(LAUNCH_PDL: tl.constexpr):
    """The beginning of a kernel that has nothing to do before the kernels ahead of it are complete."""
    pdl_wait(LAUNCH_PDL)
    pdl_release(LAUNCH_PDL)


class Kernel:
    """A kernel to be started by `kernel[grid](*arguments, **constants)`, always with the same constants in the same
    order.

    With LAUNCH_PDL=True among the constants it is launched as a programmatic dependent.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted  # triton.jit's function, or the interpreter's
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        compiles = isinstance(jitted, JITFunction)
        params = jitted.params if compiles else ()
        self._constants = tuple(param.name for param in params if param.is_constexpr)
        self._fixed = tuple(
            param.do_not_specialize or param.do_not_specialize_on_alignment
            for param in params
            if not param.is_constexpr
        )
        self._launch = self._launch_compiled if compiles else self._launch_interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch_interpreted(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.jitted[grid](*arguments, **constants)

    def _launch_compiled(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        key, values = list(constants.values()), []
        for argument, fixed in zip(arguments, self._fixed, strict=True):
            if isinstance(argument, torch.Tensor):
                value: Any = argument.data_ptr()
                key.append(argument.dtype)
                if not fixed:
                    key.append(value % 16)
            else:
                value = argument
                if type(value) is int:
                    key.append(value > _LARGEST_INT32)
                    if not fixed:
                        key.append("one" if value == 1 else value % 16 == 0)  # not 1, which equals True
            values.append(value)
        variant = self._variants.get(tuple(key))
        if variant is None:  # compile, which launches too
            compiled, constants = self._compile_and_launch(grid, arguments, constants)
            self._variants[tuple(key)] = compiled, tuple(constants[name] for name in self._constants)
            return
        compiled, given = variant
        compiled[(*grid, 1, 1)](*values, *given)

    def _compile_and_launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The compiled kernel, and the constants that it was compiled with: launch shapes are those of a card with 227
        KiB of shared memory for a program, and where there is less a pipeline has fewer stages.

        Raises OutOfResources if there is no room for one.
        """
        options = {"launch_pdl": True} if constants.get("LAUNCH_PDL") else {}
        stages = "STAGES" if "STAGES" in constants else "num_stages"
        while True:
            try:
                return self.jitted[grid](*arguments, **constants, **options), constants
            except OutOfResources as error:
                given = constants.get(stages, _STAGES)
                if error.name != "shared memory" or given == 1:
                    raise
                constants = {**constants, stages: given - 1}


def kernel(function: Any = None, *, ints: Sequence[str] = (), unaligned: Sequence[str] = ()) -> Any:
    """A decorator. ints: arguments whose value makes no variant (by default 1 and multiples of 16 do); unaligned:
    pointers whose alignment makes none.
    """
    if function is None:
        return lambda function: kernel(function, ints=ints, unaligned=unaligned)
    return Kernel(triton.jit(function, do_not_specialize=list(ints), do_not_specialize_on_alignment=list(unaligned)))
