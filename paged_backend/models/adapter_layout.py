"""Where an adapter's tensors lie in an adapter slot: one after another, as kernels/lora.py reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paged_backend.models.layer_spec import AdapterSite, LayerSpec
from paged_backend.models.shard import Cut


@dataclass(frozen=True)
class PlacedSite(AdapterSite):
    """A site, and where its tensors lie."""

    layer: int
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
class AdapterLayout:
    """The sites of all layers, in the order of their blocks' linears."""

    sites: tuple[PlacedSite, ...]
    num_layers: int
    # Architecture.renames: adapters' tensors are called like the checkpoint's
    renames: Mapping[str, str] = field(default_factory=dict)
    # of the modules that a rank has a part of, by name: of A where columns are cut, of B where rows are
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layers: Sequence[LayerSpec], hidden_size: int, renames: Mapping[str, str] | None = None
    ) -> AdapterLayout:
        sites: list[PlacedSite] = []
        for number, layer in enumerate(layers):
            for site in (*layer.attention.sites(hidden_size), *layer.mlp.sites(hidden_size)):
                sites.append(
                    PlacedSite(site.modules, site.in_size, site.out_sizes, number, sites[-1].end if sites else 0)
                )
        divided = bool(layers) and layers[0].attention.shard.size > 1
        cuts = {
            f"model.layers.{number}.{name}": cut
            for number, layer in enumerate(layers if divided else ())
            for name, cut in layer.cuts().items()
        }
        return cls(tuple(sites), len(layers), renames or {}, cuts)

    @property
    def size(self) -> int:
        """Elements of an adapter of rank 1; one of rank r takes r times as much."""
        return self.sites[-1].end

    @property
    def projections(self) -> tuple[str, ...]:
        """The last parts of the modules' names, such as q_proj."""
        return tuple(dict.fromkeys(module.rsplit(".", 1)[1] for site in self.sites for module in site.modules))

    def modules(self) -> dict[str, tuple[PlacedSite, int]]:
        """Name, such as model.layers.0.self_attn.q_proj -> its site and its number there."""
        return {
            f"model.layers.{site.layer}.{module}": (site, index)
            for site in self.sites
            for index, module in enumerate(site.modules)
        }
