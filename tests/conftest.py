"""Markers: `gpu` tests skip on a machine without a CUDA device."""

from __future__ import annotations

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
