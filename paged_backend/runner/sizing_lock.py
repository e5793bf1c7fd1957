"""Two engines that load on one GPU at once would both count the same free memory. So one loads at a time, from its
weights to its captured steps.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 600.0  # with another engine's load; then both take their chance


@contextmanager
def alone_on(device: torch.device, tell: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other engine of this machine loads on `device`, a GPU, and keeps others waiting meanwhile. No
    effect on a CPU, where memory is taken when it is first written.
    """
    if device.type != "cuda":
        yield
        return
    with alone_with(str(torch.cuda.get_device_properties(device).uuid), tell):
        yield


@contextmanager
def alone_with(name: str, tell: Callable[[str], None], patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """The lock is an abstract socket address: no file that could be left behind, and the kernel gives it back when its
    owner dies, however it dies.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        started, reported = time.monotonic(), False
        while not _bound(lock, f"\0paged-sizing-{name}"):
            if not reported:
                tell(
                    "waiting: another engine is loading on this GPU, and what it takes must be known before the "
                    "pool is sized"
                )
                reported = True
            if time.monotonic() > started + patience_seconds:
                tell(
                    f"warning: another engine has been loading on this GPU for {patience_seconds:.0f} s: this "
                    "one goes on beside it"
                )
                break
            time.sleep(_POLL_SECONDS)
        yield


def _bound(lock: socket.socket, address: str) -> bool:
    try:
        lock.bind(address)
    except OSError:  # taken
        return False
    return True
