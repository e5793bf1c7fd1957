"""The reference ops against naive float64 versions, one token and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference

# sums of a few hundred float32 products against float64: relative RMS error far below this, a wrong index far above
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run() -> None:
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert error < TOLERANCE


class Store:
    """A KV store with sequences of given lengths on shuffled pages, and the same K and V in order."""

    def __init__(
        self, lens: list[int], page_size: int, num_kv_heads: int = 2, head_dim: int = 8, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        pages_of = [-(-length // page_size) for length in lens]
        num_pages = sum(pages_of) + 3
        # what nobody wrote must not matter
        self.kv_pages = torch.full((num_pages, 2, num_kv_heads, page_size, head_dim), torch.nan)
        free = torch.randperm(num_pages, generator=generator).tolist()
        self.page_table = torch.zeros(len(lens), max(pages_of), dtype=torch.int32)
        self.keys = [torch.randn(length, num_kv_heads, head_dim, generator=generator) for length in lens]
        self.values = [torch.randn(length, num_kv_heads, head_dim, generator=generator) for length in lens]
        self.lens = torch.tensor(lens, dtype=torch.int32)
        for index, length in enumerate(lens):
            pages = [free.pop() for _ in range(pages_of[index])]
            self.page_table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            slots = torch.tensor(
                [pages[at // page_size] * page_size + at % page_size for at in range(length)], dtype=torch.int64
            )
            reference.write_kv(self.keys[index], self.values[index], self.kv_pages, slots)

    def attend(self, q: Tensor, index: int, position: int, scale: float, window: int | None) -> Tensor:
        """One query token [num_heads, head_dim] at `position` of a sequence, in float64."""
        begin = 0 if window is None else max(position + 1 - window, 0)
        group = q.shape[0] // self.keys[index].shape[1]
        out = torch.empty_like(q, dtype=torch.float64)
        for head in range(q.shape[0]):
            keys = self.keys[index][begin : position + 1, head // group].double()
            values = self.values[index][begin : position + 1, head // group].double()
            out[head] = torch.softmax(keys @ q[head].double() * scale, 0) @ values
        return out


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 100, 256], ids=lambda size: f"page{size}")
@pytest.mark.parametrize("window", [None, 1, 7, 64], ids=lambda window: f"window{window}")
def test_decode_attention_equals_softmax_in_float64(page_size: int, window: int | None) -> None:
    lens = [1, 2, 16, 17, 63, 100, 150]
    store = Store(lens, page_size)
    q = torch.randn(len(lens), 6, 8)
    out = reference.decode_attention(q, store.kv_pages, store.page_table, store.lens, max(lens), 0.3, window)
    assert_close(out, torch.stack([store.attend(q[i], i, length - 1, 0.3, window) for i, length in enumerate(lens)]))


@pytest.mark.parametrize("window", [None, 20], ids=lambda window: f"window{window}")
def test_decode_attention_in_many_chunks_equals_one(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    lens = [3, 90, 41, 150]
    store = Store(lens, 8)
    q = torch.randn(len(lens), 4, 8)
    whole = reference.decode_attention(q, store.kv_pages, store.page_table, store.lens, 150, 0.3, window)
    # sixteen tokens at once
    monkeypatch.setattr("paged_kernels.reference_layers._GATHER_BYTES", 8 * len(lens) * 2 * 8 * 16)
    assert_close(reference.decode_attention(q, store.kv_pages, store.page_table, store.lens, 150, 0.3, window), whole)


def test_decode_attention_of_an_empty_row_is_zero() -> None:
    store = Store([5, 9], 4)
    out = reference.decode_attention(
        torch.randn(2, 4, 8), store.kv_pages, store.page_table, torch.tensor([0, 9]), 9, 0.3
    )
    assert not out[0].any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("page_size", [1, 16, 64, 100], ids=lambda size: f"page{size}")
@pytest.mark.parametrize("window", [None, 1, 9], ids=lambda window: f"window{window}")
def test_prefill_attention_equals_softmax_in_float64(page_size: int, window: int | None) -> None:
    lens = [(2, 2), (5, 40), (33, 33), (20, 121)]
    store = Store([seq_len for _, seq_len in lens], page_size)
    q = torch.randn(sum(query_len for query_len, _ in lens), 4, 8)
    out = reference.prefill_attention(q, store.kv_pages, store.page_table, lens, 0.3, window)
    expected = []
    for index, (query_len, seq_len) in enumerate(lens):
        for position in range(seq_len - query_len, seq_len):
            expected.append(store.attend(q[len(expected)], index, position, 0.3, window))
    assert_close(out, torch.stack(expected))


def test_attention_of_bfloat16_is_summed_in_float32() -> None:
    store = Store([700], 16)
    kv_pages = store.kv_pages.bfloat16()
    store.keys, store.values = [store.keys[0].bfloat16()], [store.values[0].bfloat16()]
    q = torch.randn(1, 4, 8).bfloat16()
    expected = store.attend(q[0], 0, 699, 0.3, None)
    for out in (
        reference.decode_attention(q, kv_pages, store.page_table, store.lens, 700, 0.3),
        reference.prefill_attention(q, kv_pages, store.page_table, [(1, 700)], 0.3),
    ):
        assert out.dtype == torch.bfloat16
        assert torch.allclose(out[0].double(), expected, rtol=2**-8, atol=1e-6)  # the rounding of the result alone


def test_write_kv_puts_each_token_at_its_slot_and_padding_nowhere() -> None:
    kv_pages = torch.zeros(5, 2, 2, 4, 3)
    k, v = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    reference.write_kv(k, v, kv_pages, torch.tensor([19, -1, 0, 6]))
    for token, (page, offset) in {0: (4, 3), 2: (0, 0), 3: (1, 2)}.items():
        assert torch.equal(kv_pages[page, 0, :, offset], k[token])
        assert torch.equal(kv_pages[page, 1, :, offset], v[token])
    assert kv_pages.count_nonzero() == 3 * 2 * 6


def test_a_store_of_8_bits_takes_the_nearest_number_it_has_and_keeps_it_through_copies() -> None:
    kv_pages = torch.zeros(3, 2, 1, 4, 4).to(torch.float8_e4m3fn)
    k = torch.tensor([1.0, 1.1, -1000.0, float("nan")]).view(1, 1, 4)
    reference.write_kv(k, 2 * k, kv_pages, torch.tensor([6]))
    reference.copy_pages([kv_pages], torch.tensor([[1, 2]]))
    for page in (1, 2):
        stored = kv_pages.float()[page, :, 0, 2].nan_to_num(7)
        assert stored.tolist() == [[1.0, 1.125, -448.0, 7.0], [2.0, 2.25, -448.0, 7.0]]
    assert kv_pages.float().nan_to_num(1).count_nonzero() == 2 * 8


def test_rms_norm_equals_its_definition() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    expected = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_close(reference.norm(x, Norm(weight, 1e-5)), expected)


def test_silu_mul_gates_the_second_half_with_the_first() -> None:
    gate_up = torch.randn(3, 10).double()
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    assert_close(reference.gate(gate_up), gate / (1 + torch.exp(-gate)) * up)


def test_rope_turns_each_pair_by_its_angle() -> None:
    angles = torch.rand(20, 4) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    x, positions = torch.randn(3, 2, 8), torch.tensor([19, 0, 7])
    out = reference.apply_rope(x, table, positions)
    for token, position in enumerate(positions.tolist()):
        for pair in range(4):
            before = torch.complex(x[token, :, pair], x[token, :, pair + 4])
            after = before * complex(math.cos(angles[position, pair]), math.sin(angles[position, pair]))
            assert torch.allclose(out[token, :, pair], after.real, atol=1e-6)
            assert torch.allclose(out[token, :, pair + 4], after.imag, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_rope_write_kv_splits_norms_turns_and_stores(qk_norm: bool) -> None:
    qkv, kv_pages = torch.randn(3, (4 + 2 * 2) * 8), torch.zeros(2, 2, 2, 4, 8)
    table, positions, slots = torch.randn(10, 8), torch.tensor([3, 4, 9]), torch.tensor([7, 1, 2])
    norms = (Norm(torch.randn(8), 1e-6), Norm(torch.randn(8), 1e-6)) if qk_norm else None
    q_out = reference.rope_write_kv(qkv, 4, norms, table, positions, kv_pages, slots)
    q, k, v = qkv[:, :32].view(3, 4, 8), qkv[:, 32:48].view(3, 2, 8), qkv[:, 48:].view(3, 2, 8)
    if norms is not None:
        q, k = reference.norm(q, norms[0]), reference.norm(k, norms[1])
    assert torch.equal(q_out, reference.apply_rope(q, table, positions))
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(kv_pages[slot // 4, 0, :, slot % 4], reference.apply_rope(k, table, positions)[token])
        assert torch.equal(kv_pages[slot // 4, 1, :, slot % 4], v[token])
