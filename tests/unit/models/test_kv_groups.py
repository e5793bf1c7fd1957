"""Which layers share a page table."""

from __future__ import annotations

import pytest

from paged_backend.models.kv_groups import group_layers

GEMMA = tuple(None if layer % 6 == 5 else 1024 for layer in range(34))
CASES = {
    "one kind": ((None,) * 28, 4096, [(None, 28)], 28),
    "one kind with a window": ((4096,) * 32, 32768, [(4096, 32)], 32),
    "windows that hold every sequence": (GEMMA, 1024, [(None, 34)], 34),
    "gpt-oss: every other layer": ((128, None) * 12, 4096, [(None, 12), (128, 12)], 12),
    "Gemma 3 4B: five of six": (GEMMA, 8192, [(None, 5)] + [(1024, 5)] * 5 + [(1024, 4)], 5),
    "one layer of its own": ((None,) + (512,) * 27, 8192, [(None, 1)] + [(512, 4)] * 6 + [(512, 3)], 4),
    "three kinds": ((None, 64, 512) * 4, 8192, [(None, 4), (512, 4), (64, 4)], 4),
}


@pytest.mark.parametrize(("windows", "max_len", "expected", "num_layers"), CASES.values(), ids=CASES)
def test_layers_that_keep_the_same_are_grouped_with_little_room_unused(
    windows: tuple[int | None, ...], max_len: int, expected: list[tuple[int | None, int]], num_layers: int
) -> None:
    groups = group_layers(windows, max_len)
    assert [(group.window, len(group.layers)) for group in groups.groups] == expected
    assert groups.num_layers == num_layers


@pytest.mark.parametrize("windows", [(None,) * 3, (128, None) * 12, GEMMA], ids=["one", "two", "seven"])
def test_every_layer_has_a_place_of_its_own_in_its_groups_pages(windows: tuple[int | None, ...]) -> None:
    groups = group_layers(windows, 100_000)
    assert len(set(groups.places)) == len(groups.places) == len(windows)
    assert all(
        place < groups.num_layers and groups.groups[group].window == window
        for (group, place), window in zip(groups.places, windows, strict=True)
    )
