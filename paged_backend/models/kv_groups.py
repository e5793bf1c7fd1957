"""Layers that keep the same K and V: those that attend to all tokens, and those with a sliding window, whose pages may
go once the window has left them.

Each group has a page table of its own, and all take pages from one pool. A page has the same bytes in every group, so
the groups are equally large: a kind of layer is split into several groups if it has many layers, and the last of them
may have room for more layers than it has. (Idea: vLLM's hybrid KV cache.)

    layers  F S S F S S     groups of 2:  F F | S S | S S     a page: K and V of page_size tokens in 2 layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST_GROUPS = 8  # each costs a launch a step


@dataclass(frozen=True)
class KVGroup:
    """Layers that share a page table."""

    window: int | None  # tokens that their tokens attend to, themselves included; None: all
    layers: tuple[int, ...]


@dataclass(frozen=True)
class KVGroups:
    """All groups, those that keep most first."""

    groups: tuple[KVGroup, ...]
    num_layers: int  # of a page: of the largest group

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(group.window for group in self.groups)

    @property
    def words(self) -> str:
        """What each keeps, for the log."""
        return ", ".join("all tokens" if window is None else f"the last {window}" for window in self.windows)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each layer of the model its group, and its place in the pages of that."""
        places = {
            layer: (number, place)
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }
        return tuple(places[layer] for layer in range(len(places)))


def group_layers(windows: Sequence[int | None], max_len: int) -> KVGroups:
    """Groups of equal size that leave the least room unused, and of these the fewest. windows: of each layer, in
    tokens; those that hold a sequence of max_len tokens are none.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(None if window is None or window >= max_len else window, []).append(layer)
    sizes = range(1, len(windows) + 1)

    def num_groups(size: int) -> int:
        return sum(-(-len(layers) // size) for layers in kinds.values())

    most = max(_MOST_GROUPS, len(kinds))
    size = min(
        (size for size in sizes if num_groups(size) <= most),
        key=lambda size: (num_groups(size) * size, num_groups(size)),
    )
    ordered = sorted(kinds.items(), key=lambda kind: max_len if kind[0] is None else kind[0], reverse=True)
    groups = [
        KVGroup(window, tuple(layers[at : at + size]))
        for window, layers in ordered
        for at in range(0, len(layers), size)
    ]
    return KVGroups(tuple(groups), size)
