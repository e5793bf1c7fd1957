"""Items grouped by owner, in one launch or two: as a stable sort by owner orders them, in tiles of one owner each."""

from __future__ import annotations

import pytest
import torch

from paged_kernels import grouping

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def owners_of(kind: str, num_items: int, num_owners: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_items)
    owners = torch.randint(0, num_owners, (num_items,), generator=generator, dtype=torch.int32)
    if kind == "one has all":
        owners.fill_(num_owners - 1)
    if kind == "some have none, some items nobody":
        owners = torch.where(owners % 3 == 0, -1, owners // 2)
    return owners.to(DEVICE, torch.int32)


@pytest.mark.parametrize("two_launches", [False, True], ids=["one launch", "two launches"])
@pytest.mark.parametrize("kind", ["spread", "one has all", "some have none, some items nobody"])
@pytest.mark.parametrize(("num_items", "num_owners", "tile"), [(1, 5, 16), (70, 6, 16), (333, 40, 32)])
def test_order_is_that_of_a_stable_sort(
    num_items: int, num_owners: int, tile: int, kind: str, two_launches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_FEW", 0 if two_launches else 2**30)
    monkeypatch.setattr(grouping, "_CHUNK", 128)
    monkeypatch.setattr(grouping, "_AT_ONCE", 256)
    owners = owners_of(kind, num_items, num_owners)
    order = torch.full((num_items,), 10_000, dtype=torch.int32, device=DEVICE)
    tiles = torch.full((grouping.max_tiles(num_items, num_owners, tile), 3), 10_000, dtype=torch.int32, device=DEVICE)
    grouping.group_by_owner(owners, num_owners, order, tiles, tile)
    expected = [index for owner in range(num_owners) for index in torch.nonzero(owners == owner).flatten().tolist()]
    assert order.tolist()[: len(expected)] == expected
    places = []
    for owner, first, count in tiles.tolist():
        if owner >= 0:
            assert 1 <= count <= tile and all(int(owners[index]) == owner for index in expected[first : first + count])
            places += range(first, first + count)
    assert places == list(range(len(expected)))
