"""EXAONE 4: norms behind the blocks, of query and key heads, too; where there are sliding windows, layers without one
have no positions.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from paged_backend.models.config_file import ConfigFile
from paged_backend.models.families.family import Family, dense_layers, windows_by_layer_type
from paged_backend.models.families.olmo import POST_NORMS
from paged_backend.models.layer_spec import ALL_LAYERS, LayerSpec


class Exaone4Config(ConfigFile):
    # layer_types says what it means; transformers derives them if they are not there
    sliding_window_pattern: str | int | None = None


def layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    windows = windows_by_layer_type(config)
    ropes = tuple(ALL_LAYERS if window or not config.sliding_window else None for window in windows)
    return dense_layers(config, windows, ropes=ropes, layer=POST_NORMS, qk_norm="head")


EXAONE4 = Family("Exaone4ForCausalLM", "exaone4", layers, config=Exaone4Config, models="EXAONE 4")
