"""Pages are copied bit for bit, in every layer, and no other page changes."""

from __future__ import annotations

import pytest
import torch

from paged_kernels.page_copy import copy_pages, make_page_layers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(num_layers: int, num_pages: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_pages, *shape, generator=generator).to(DEVICE, dtype) for _ in range(num_layers)]


def assert_copied(layers: list[torch.Tensor], copies: list[tuple[int, int]]) -> None:
    expected = [layer.clone() for layer in layers]
    for layer in expected:
        for source, target in copies:
            if source >= 0:
                layer[target] = layer[source]
    copy_pages(make_page_layers(layers), torch.tensor(copies, dtype=torch.int32, device=DEVICE).view(-1, 2))
    for layer, copied in zip(layers, expected, strict=True):
        assert torch.equal(layer, copied)


CASES = {
    "one page": ((2, 2, 4, 6), torch.float32, [(3, 0)]),
    "several pages": ((2, 2, 4, 6), torch.float32, [(3, 0), (5, 6), (3, 1)]),
    "padding": ((2, 2, 4, 6), torch.float32, [(-1, 2), (4, 5), (-1, -1)]),
    "none": ((2, 2, 4, 6), torch.float32, []),
    "more than one block a page": ((2, 3, 40, 24), torch.float32, [(0, 6)]),
    "float16": ((2, 1, 4, 2), torch.float16, [(6, 0)]),
}


@pytest.mark.parametrize(("shape", "dtype", "copies"), CASES.values(), ids=CASES.keys())
def test_a_page_becomes_a_copy_in_every_layer(
    shape: tuple[int, ...], dtype: torch.dtype, copies: list[tuple[int, int]]
) -> None:
    assert_copied(make(3, 7, shape, dtype), copies)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_a_page_becomes_a_copy_in_every_layer_of_a_large_store(page_size: int) -> None:
    assert_copied(make(8, 100, (2, 8, page_size, 128), torch.bfloat16), [(7, 99), (98, 0), (-1, 3), (50, 51)])


@pytest.mark.gpu
def test_a_copy_reaches_offsets_past_2_to_the_32() -> None:
    layer = torch.zeros(2**16 + 2**12 + 1, 2, 8, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    layer[3] = 1.5
    copy_pages(make_page_layers([layer]), torch.tensor([[3, 2**16 + 2**12]], dtype=torch.int32, device=DEVICE))
    assert (layer[-1] == 1.5).all()
    assert layer.count_nonzero() == 2 * layer[0].numel()


def test_refuses_layers_that_differ_and_pages_of_odd_bytes() -> None:
    layers = make(2, 3, (2, 4), torch.float32)
    with pytest.raises(ValueError, match="alike"):
        make_page_layers([layers[0], layers[1][:2]])
    with pytest.raises(ValueError, match="four bytes"):
        make_page_layers(make(1, 3, (1, 3), torch.float16))
    with pytest.raises(ValueError, match="source, target"):
        copy_pages(make_page_layers(layers), torch.zeros(3, 3, dtype=torch.int32, device=DEVICE))
