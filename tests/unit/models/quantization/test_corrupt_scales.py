"""In every format a scale of another shape, or one that is zero, negative or not finite, is refused by its tensor's
name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paged_backend.errors import EngineError
from tests.oracle import save_over
from tests.published_formats import FORMATS, save_published
from tests.quantised_checkpoints import save_compressed
from tests.runner_driver import load_runner
from tests.unit.models.quantization.test_compressed_tensors import CASES

MODULE = "model.layers.1.mlp.up_proj."
ZERO_GROUPS = ("modelopt-nvfp4", "NVFP4A16")  # a group of zeros has a scale of 0


def saved(folder: Path, name: str) -> Path:
    if name in FORMATS:
        save_published(folder, FORMATS[name])
    else:
        save_compressed(folder, CASES[name])
    return folder


def changes(name: str, ending: str, scale: Tensor) -> Iterator[tuple[Tensor, str]]:
    """A tensor in the scale's place, and what is said of it."""
    if scale.dim():
        yield scale.new_ones(*scale.shape, 2), "has shape"
        yield scale.new_ones(len(scale) + 1, *scale.shape[1:]), "has shape"
    else:
        yield scale.new_ones(2), "has shape"
    if scale.dtype == torch.uint8:  # exponents of powers of two
        yield with_last(scale, 255), "NaN"
        return
    yield with_last(scale, float("nan")), "not finite"
    if not (name in ZERO_GROUPS and ending == "weight_scale"):
        yield with_last(scale, 0.0), "a scale of 0"
    yield with_last(scale, -0.5), "a scale of -0.5"


def with_last(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [*FORMATS, *CASES])
def test_a_scale_that_is_none_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path, name) / "model.safetensors"
    tensors = load_file(file)
    endings = [key.removeprefix(MODULE) for key in tensors if key.startswith(MODULE) and "scale" in key]
    if name in ZERO_GROUPS:  # activations stay as they are
        endings = [ending for ending in endings if ending != "input_scale"]
    assert endings
    for ending in endings:
        for wrong, words in changes(name, ending, tensors[MODULE + ending]):
            save_over({**tensors, MODULE + ending: wrong.contiguous()}, file)
            with pytest.raises(EngineError, match=f"tensor {MODULE}{ending}.*{words}"):
                load_runner(tmp_path)
