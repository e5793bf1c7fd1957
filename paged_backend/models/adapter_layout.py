"""Where an adapter's tensors lie in a berth: one after another, as kernels/lora.py reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paged_backend.models.architecture import Architecture


@dataclass(frozen=True)
class Site:
    """A packed product of a layer, with the modules of PEFT that it is made of."""

    modules: tuple[str, ...]  # within the layer, such as self_attn.q_proj
    in_size: int
    out_sizes: tuple[int, ...]  # of each module
    offset: int  # where it begins; in elements of an adapter of rank 1, as everything here

    @property
    def b_offset(self) -> int:
        return self.offset + len(self.modules) * self.in_size

    @property
    def end(self) -> int:
        return self.b_offset + sum(self.out_sizes)

    def places(self, index: int) -> tuple[int, int]:
        """Where A and B of its index-th module begin."""
        return self.offset + index * self.in_size, self.b_offset + sum(self.out_sizes[:index])


@dataclass(frozen=True)
class LayerSites:
    qkv: Site
    out: Site
    gate_up: Site
    down: Site


@dataclass(frozen=True)
class AdapterLayout:
    layers: tuple[LayerSites, ...]
    size: int  # of all; an adapter of rank r takes r times as much

    @classmethod
    def of(cls, a: Architecture) -> AdapterLayout:
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        layers, end = [], 0
        for _ in range(a.num_layers):
            qkv = _site("self_attn", ("q_proj", "k_proj", "v_proj"), a.hidden_size, (q_size, kv_size, kv_size), end)
            out = _site("self_attn", ("o_proj",), q_size, (a.hidden_size,), qkv.end)
            gate_up = _site("mlp", ("gate_proj", "up_proj"), a.hidden_size, (a.intermediate_size,) * 2, out.end)
            down = _site("mlp", ("down_proj",), a.intermediate_size, (a.hidden_size,), gate_up.end)
            layers.append(LayerSites(qkv, out, gate_up, down))
            end = down.end
        return cls(tuple(layers), end)

    def modules(self) -> dict[str, tuple[Site, int]]:
        """Name, such as model.layers.0.self_attn.q_proj -> its site and its number there."""
        found: dict[str, tuple[Site, int]] = {}
        for number, layer in enumerate(self.layers):
            for site in (layer.qkv, layer.out, layer.gate_up, layer.down):
                found |= {f"model.layers.{number}.{module}": (site, index) for index, module in enumerate(site.modules)}
        return found


def _site(block: str, names: Sequence[str], in_size: int, out_sizes: tuple[int, ...], offset: int) -> Site:
    return Site(tuple(f"{block}.{name}" for name in names), in_size, out_sizes, offset)
