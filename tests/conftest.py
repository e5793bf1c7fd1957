"""Markers: `gpu` tests skip on a machine without a CUDA device."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

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


_STARTING_SERVERS = {Path(__file__).with_name(name) for name in ("server", "clients", "chaos")}


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


def pytest_configure(config: pytest.Config) -> None:
    """Files are given to workers in the order below, not those with the most tests first: those that start servers have
    few tests, and would all wait together at the end.
    """
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


def _spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files that start servers, which wait more than they compute, evenly between the others; else in their order."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kinds: tuple[list[Path], list[Path]] = ([], [])
    for path in files:
        kinds[path.parent in _STARTING_SERVERS].append(path)
    placed = [((place + 0.5) / len(kind), path) for kind in kinds for place, path in enumerate(kind)]
    return [item for _, path in sorted(placed) for item in files[path]]


def _left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """By the mark `one_in`, the cases whose values' places in their lists add up to no multiple of n: so the values of
    a parameter take turns with those of the others. Those that need a GPU stay, and one that is named alone.
    """
    cases: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("one_in"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    found: list[pytest.Item] = []
    for of_one in cases.values():
        (n,) = of_one[0].get_closest_marker("one_in").args
        lists = [list(dict.fromkeys(ids)) for ids in zip(*(each.callspec._idlist for each in of_one), strict=True)]
        for each in of_one:
            place = sum(map(list.index, lists, each.callspec._idlist))
            if place % n and not each.get_closest_marker("gpu"):
                found.append(each)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in _left_out(items):
        item.add_marker(pytest.mark.long)
    items[:] = _spread(items)
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
