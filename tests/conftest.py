"""Markers: `gpu` tests skip on a machine without a CUDA device."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

import pytest
import torch

from tests.interpreter import make_interpreter_faster

# kernels run in the Triton language's interpreter, which must be asked for before anything imports triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    make_interpreter_faster()

# Tiny models gain nothing from a second thread, and threads that wait for each other actively are slow wherever
# something else runs. Servers inherit the variable; this process has read it already.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end, two million objects: nobody looks for garbage among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # the end of the process: libraries complain of what is never freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
