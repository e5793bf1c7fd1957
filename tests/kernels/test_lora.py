"""Adapters of many sequences in one step, against float64 and the twins in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from paged_kernels import lora
from paged_kernels.reference import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# hidden vectors and result are rounded once each
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}
NO_TILE = -1


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dataclass(frozen=True)
class Product:
    """A packed product somewhere in an adapter."""

    size: int  # of x
    out_sizes: tuple[int, ...]
    offset: int = 24  # elements of rank 1 before it

    @property
    def num_rows(self) -> int:
        return sum(self.out_sizes)

    @property
    def b_offset(self) -> int:
        return self.offset + len(self.out_sizes) * self.size


class AdapterStore:
    """Adapters of given ranks, at random."""

    def __init__(self, product: Product, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.product, self.largest = product, max(ranks)
        self.ranks = torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
        self.weights = (
            randn(len(ranks), self.largest * (product.b_offset + product.num_rows + 5), dtype=dtype, seed=1) * 0.3
        )

    def delta(self, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """float64."""
        p, rank, parts = self.product, int(self.ranks[adapter]), len(self.product.out_sizes)
        mine = self.weights[adapter].double()
        a = mine[rank * p.offset : rank * p.b_offset].view(parts, rank, p.size)
        b = mine[rank * p.b_offset : rank * (p.b_offset + p.num_rows)].view(p.num_rows, rank).split(list(p.out_sizes))
        return torch.cat([x.double() @ a[part].T @ b[part].T for part in range(parts)], dim=-1)


def grouped(ops: object, token_adapters: torch.Tensor, num_adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.full_like(token_adapters, 10_000)
    tiles = torch.full((ops.num_tiles(len(token_adapters), num_adapters), 3), 10_000, dtype=torch.int32, device=DEVICE)  # type: ignore[attr-defined]
    ops.group_tokens(token_adapters, num_adapters, order, tiles)  # type: ignore[attr-defined]
    return order, tiles


def added(
    ops: object, x: torch.Tensor, out: torch.Tensor, adapters: AdapterStore, token_adapters: torch.Tensor
) -> torch.Tensor:
    """out with everybody's adapter added, by the ops of a module."""
    p, parts = adapters.product, len(adapters.product.out_sizes)
    order, tiles = grouped(ops, token_adapters, len(adapters.ranks))
    hidden = torch.full((ops.num_splits(*x.shape), len(x), parts * adapters.largest), float("nan"), device=DEVICE)  # type: ignore[attr-defined]
    ops.adapter_shrink(x, adapters.weights, adapters.ranks, order, tiles, p.offset, parts, hidden)  # type: ignore[attr-defined]
    ops.adapter_expand(hidden, adapters.weights, adapters.ranks, order, tiles, p.b_offset, p.out_sizes, out)  # type: ignore[attr-defined]
    return out


def owners(num_tokens: int, num_adapters: int, seed: int = 0) -> torch.Tensor:
    """Decodes of anybody or nobody, then a prompt."""
    chosen = torch.randint(
        -1, num_adapters, (num_tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    chosen[num_tokens - num_tokens // 3 :] = num_adapters - 1
    return chosen.to(DEVICE)


QKV, ONE, GATE_UP = Product(40, (32, 16, 16)), Product(24, (40,), 0), Product(16, (24, 24))
TINY = [(1, QKV, [3]), (5, QKV, [4, 1, 8]), (19, ONE, [2, 17, 5, 4]), (9, GATE_UP, [20, 3])]
LARGE = [
    pytest.param(tokens, product, ranks, dtype, marks=pytest.mark.gpu)
    for tokens in (1, 7, 64, 200, 700, 2048)
    for product in (Product(4096, (4096, 1024, 1024), 1000), Product(14336, (4096,), 8), Product(2048, (8192, 8192), 0))
    for ranks, dtype in (([16, 8, 64, 1, 32, 16, 16, 5], torch.bfloat16), ([128, 3], torch.float16))
]


@pytest.mark.parametrize(("num_tokens", "product", "ranks", "dtype"), [(*case, torch.float32) for case in TINY] + LARGE)
def test_every_token_gets_its_own_adapter_and_nothing_else(
    num_tokens: int, product: Product, ranks: list[int], dtype: torch.dtype
) -> None:
    adapters = AdapterStore(product, ranks, dtype)
    token_adapters = owners(num_tokens, len(ranks))
    x, base = (
        randn(num_tokens, product.size + 8, dtype=dtype, seed=2)[:, : product.size],
        randn(num_tokens, product.num_rows, dtype=dtype, seed=3),
    )
    ours = added(lora, x, base.clone(), adapters, token_adapters)
    twins = added(reference, x, base.clone(), adapters, token_adapters)
    bare = token_adapters < 0
    assert torch.equal(ours[bare], base[bare]) and torch.equal(twins[bare], base[bare])
    for adapter in range(len(ranks)):
        mine = token_adapters == adapter
        if mine.any():
            expected = base[mine].double() + adapters.delta(x[mine], adapter)
            for out in (ours[mine], twins[mine]):
                error = (out.double() - expected).norm() / expected.norm()
                assert error <= TOLERANCE[dtype], f"adapter {adapter}: relative RMS error {error:.2e}"  # NaN fails too


def test_long_sums_are_split_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "num_splits", lambda num_tokens, num_columns: 3)
    product = Product(300, (16,))
    adapters, token_adapters = (
        AdapterStore(product, [4, 2], torch.float32),
        torch.tensor([0, -1, 1], dtype=torch.int32, device=DEVICE),
    )
    x = randn(3, 300, seed=2)
    out = added(lora, x, torch.zeros(3, 16, device=DEVICE), adapters, token_adapters)
    expected = torch.stack(
        [adapters.delta(x[0], 0), torch.zeros(16, dtype=torch.float64, device=DEVICE), adapters.delta(x[2], 1)]
    )
    assert (out - expected).norm() <= 2e-6 * expected.norm()


def test_an_empty_adapter_changes_nothing() -> None:
    adapters = AdapterStore(ONE, [0, 2], torch.float32)
    x, base = randn(3, ONE.size), randn(3, ONE.num_rows, seed=3)
    for ops in (lora, reference):
        assert torch.equal(
            added(ops, x, base.clone(), adapters, torch.zeros(3, dtype=torch.int32, device=DEVICE)), base
        )


@pytest.mark.parametrize(
    "num_tokens", [1, 17, 64, pytest.param(300, marks=pytest.mark.gpu), pytest.param(2048, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("num_adapters", [1, 3, 8])
def test_tiles_hold_every_token_once_in_order_and_of_one_adapter(num_tokens: int, num_adapters: int) -> None:
    token_adapters = owners(num_tokens, num_adapters, seed=num_adapters)
    order, tiles = grouped(lora, token_adapters, num_adapters)
    found: dict[int, list[int]] = {}
    for adapter, first, count in tiles.tolist():
        if adapter != NO_TILE:
            assert 1 <= count <= lora.tile_tokens(num_tokens)
            found.setdefault(adapter, []).extend(order[first : first + count].tolist())
    assert found == {
        adapter: torch.nonzero(token_adapters == adapter).squeeze(1).tolist()
        for adapter in set(token_adapters.tolist()) - {-1}
    }
    assert torch.equal(
        order[: int((token_adapters >= 0).sum())],
        grouped(reference, token_adapters, num_adapters)[0][: int((token_adapters >= 0).sum())],
    )


def test_tokens_belong_to_their_rows_adapter_and_padding_to_none() -> None:
    # a column of a wider table
    state = torch.tensor([[7, 2], [7, -1], [7, 0], [7, 5]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([3, -1, 0, 1, 2, -1], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 1, 2, 2, 142, 145, 147], dtype=torch.int32, device=DEVICE)
    expected = [5, -1, *[-1] * 140, 0, 0, 0, -1, -1]
    for ops in (lora, reference):
        token_adapters = torch.full((147,), 99, dtype=torch.int32, device=DEVICE)
        ops.assign_adapters(rows, starts, state[:, 1], token_adapters)
        assert token_adapters.tolist() == expected


def test_refuses_what_does_not_fit() -> None:
    adapters = AdapterStore(ONE, [2], torch.float32)
    order, tiles = grouped(lora, torch.zeros(3, dtype=torch.int32, device=DEVICE), 1)
    hidden = torch.zeros(1, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit each other"):
        lora.adapter_shrink(randn(3, ONE.size).half(), adapters.weights, adapters.ranks, order, tiles, 0, 1, hidden)
    with pytest.raises(ValueError, match="do not fit each other"):
        lora.adapter_shrink(randn(4, ONE.size), adapters.weights, adapters.ranks, order, tiles, 0, 1, hidden)
    with pytest.raises(ValueError, match="do not fit each other"):
        lora.adapter_expand(hidden, adapters.weights, adapters.ranks, order, tiles, ONE.b_offset, (39,), randn(3, 40))


@pytest.mark.gpu
def test_dependent_launches_are_bit_equal_to_plain_ones() -> None:
    """Programmatic dependent launch overlaps each kernel with the end of the one before; nothing may be read too
    early.
    """
    product = Product(2048, (2048,))
    adapters, token_adapters = AdapterStore(product, [16, 8, 4], torch.bfloat16), owners(64, 3)
    results = []
    for pdl in (False, True):
        x = randn(64, 2048, dtype=torch.bfloat16, seed=2)
        order, tiles = grouped(lora, token_adapters, 3)
        hidden = torch.zeros(lora.num_splits(64, 2048), 64, 16, device=DEVICE)
        for _ in range(50):
            out = torch.zeros_like(x)
            lora.adapter_shrink(
                x, adapters.weights, adapters.ranks, order, tiles, product.offset, 1, hidden, launch_pdl=pdl
            )
            lora.adapter_expand(
                hidden, adapters.weights, adapters.ranks, order, tiles, product.b_offset, (2048,), out, launch_pdl=pdl
            )
            x = (out / out.float().norm().clamp(min=1e-3) * 40).to(torch.bfloat16)
        results.append(x)
    assert torch.equal(results[0], results[1]) and results[0].isfinite().all()
