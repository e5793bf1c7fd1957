"""What a device can do that kernels and their launch shapes depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

Capability = tuple[int, int]
LEAST_CAPABILITY: Capability = (8, 0)  # Ampere: the Triton language compiles for nothing older
FP8_CAPABILITY: Capability = (8, 9)  # Ada; the Triton language refuses to convert to and from it on older ones
_DEPENDENTS: Capability = (9, 0)  # Hopper
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99}


@dataclass(frozen=True)
class DeviceTraits:
    """Of a GPU; or of the interpreter of the Triton language, which computes on a CPU."""

    compiles: bool  # kernels, instead of interpreting them
    capability: Capability
    num_multiprocessors: int

    @property
    def launches_dependents(self) -> bool:
        """Whether a kernel may begin while the one before it ends: programmatic dependent launch (jit.py)."""
        return self.compiles and self.capability >= _DEPENDENTS

    @property
    def shared_kib(self) -> int:
        """Of shared memory that a program may have. Source: CUDA C++ Programming Guide, "Technical Specifications per
        Compute Capability".
        """
        return _SHARED_KIB.get(self.capability, 227 if self.capability < (12, 0) else 99)

    @property
    def has_fp8(self) -> bool:
        """Whether kernels can read and multiply numbers of float8_e4m3fn."""
        return self.capability >= FP8_CAPABILITY


_INTERPRETER = DeviceTraits(compiles=False, capability=_DEPENDENTS, num_multiprocessors=4)


@cache
def traits_of(device: torch.device) -> DeviceTraits:
    if device.type != "cuda":
        return _INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return DeviceTraits(True, (found.major, found.minor), found.multi_processor_count)
