"""Weights through buffers: every number arrives, whatever the sizes are, and what goes wrong on a thread is heard
of.
"""

from __future__ import annotations

import pytest
import torch

from paged_backend.models.upload import Uploads

DEVICES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu),
]
# a buffer of 64 bytes holds 16 numbers of 4 bytes
SHAPES = [(1,), (15,), (16,), (17,), (33, 7), (4, 64), (1, 1), (0,), (129, 31)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [None, 0, 1, 4])
def test_every_number_arrives(device: torch.device, dtype: torch.dtype, num_threads: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=generator) for shape in SHAPES * 5]
    with torch.inference_mode():
        targets = [torch.full(source.shape, float("nan"), dtype=dtype, device=device) for source in sources]
        with Uploads(device, num_threads, buffer_bytes=64) as uploads:
            for target, source in zip(targets, sources, strict=True):
                uploads.put(target, source)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_packed_tensor_are_filled_and_no_others(device: torch.device) -> None:
    packed = torch.zeros(10, 8, device=device)
    with Uploads(device, 2, buffer_bytes=64) as uploads:
        uploads.put(packed[3:5], torch.ones(2, 8))
        uploads.put(packed[7:], torch.full((3, 8), 2.0))
    assert packed[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_transposed_target_is_filled(device: torch.device) -> None:
    source = torch.arange(3 * 5 * 40, dtype=torch.float32).view(3, 5, 40)  # rows beyond the buffer too
    target = torch.zeros(3, 40, 5, device=device)
    with Uploads(device, 2, buffer_bytes=64) as uploads:
        uploads.put(target.transpose(1, 2), source)
    assert torch.equal(target.cpu(), source.transpose(1, 2))


def test_what_fails_on_a_thread_is_raised_at_the_end() -> None:
    uploads = Uploads(torch.device("cpu"), 2, buffer_bytes=64)
    uploads.put(torch.zeros(4), torch.ones(3))
    for _ in range(20):  # and holds up nobody meanwhile
        uploads.put(torch.zeros(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="size"):
        uploads.__exit__(None, None, None)
