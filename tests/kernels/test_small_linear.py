"""Products of few tokens with everything that hangs on them, against float64. Rounding of the result alone is 1.1e-3 in
bfloat16 and 1.4e-4 in float16.
"""

from __future__ import annotations

import pytest
import torch

from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import reference
from paged_kernels.small_linear import NarrowShape, VectorShape, make_linear_workspace, narrow_linear, vector_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
EPS = 1e-5
OPTIONS = ["plain", "bias", "residual", "gate", "gate and bias", "bias and residual"]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error, size = (out.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[out.dtype] * size, f"relative RMS error {error / size:.2e}"  # NaN fails too


def operands(
    num_tokens: int, num_rows: int, num_columns: int, dtype: torch.dtype, options: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    gated = "gate" in options
    x = randn(num_tokens, num_columns, dtype=dtype)
    weight = randn(num_rows * (2 if gated else 1), num_columns, dtype=dtype, seed=1, scale=num_columns**-0.5)
    given: dict[str, object] = {"gated": gated}
    given["bias"] = randn(len(weight), dtype=dtype, seed=2) if "bias" in options else None
    given["residual"] = randn(num_tokens, num_rows, dtype=dtype, seed=3) if "residual" in options else None
    return x, weight, given


def oracle(
    x: torch.Tensor, weight: torch.Tensor, given: dict[str, object], norm: torch.Tensor | None = None
) -> torch.Tensor:
    wide = x.double()
    if norm is not None:
        wide = norm.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    result = wide @ weight.double().T
    if isinstance(given["bias"], torch.Tensor):
        result = result + given["bias"].double()
    if given["gated"]:
        gate, up = result.chunk(2, -1)
        result = torch.nn.functional.silu(gate) * up
    if isinstance(given["residual"], torch.Tensor):
        result = result + given["residual"].double()
    return result


TINY_VECTORS = [
    (5, 24, torch.float32, VectorShape(2, 16, 1)),
    (16, 64, torch.float32, VectorShape(4, 64, 1)),
    (3, 40, torch.float16, VectorShape(4, 16, 1)),
]
LARGE_VECTORS = [
    pytest.param(rows, columns, dtype, None, marks=pytest.mark.gpu)
    for rows, columns in ((3072, 2048), (2048, 8192), (14336, 4096), (4096, 14336), (1000, 3072), (896, 4864))
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(("num_rows", "num_columns", "dtype", "shape"), TINY_VECTORS + LARGE_VECTORS)
def test_one_token_equals_float64(
    num_rows: int, num_columns: int, dtype: torch.dtype, shape: VectorShape | None, options: str, with_norm: bool
) -> None:
    x, weight, given = operands(1, num_rows, num_columns, dtype, options)
    norm = randn(num_columns, dtype=dtype, seed=4) if with_norm else None
    out = torch.full((1, num_rows), float("nan"), dtype=dtype, device=DEVICE)
    assert (
        vector_linear(x, weight, out=out, shape=shape, norm=None if norm is None else Norm(norm, EPS), **given) is out
    )  # type: ignore[arg-type]
    assert_close(out, oracle(x, weight, given, norm))


TINY = [
    (1, 16, 16, torch.float32, NarrowShape(16, 16, 1, 2, 1, 0)),
    (3, 40, 72, torch.float32, NarrowShape(16, 16, 1, 2, 1, 0)),
    (16, 33, 64, torch.float32, NarrowShape(16, 16, 3, 2, 1, 0)),
    (17, 48, 40, torch.float16, NarrowShape(16, 16, 2, 2, 1, 0)),
]
LARGE = [
    pytest.param(tokens, rows, columns, torch.bfloat16, None, marks=pytest.mark.gpu)
    for tokens in (2, 8, 16, 31, 64, 100, 128)
    for rows, columns in ((3072, 2048), (2048, 8192), (14336, 4096), (1000, 3072))
] + [pytest.param(24, 896, 4864, torch.float16, None, marks=pytest.mark.gpu)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns", "dtype", "shape"), TINY + LARGE)
def test_few_tokens_equal_float64(
    num_tokens: int, num_rows: int, num_columns: int, dtype: torch.dtype, shape: NarrowShape | None, options: str
) -> None:
    workspace = make_linear_workspace(DEVICE)
    x, weight, given = operands(num_tokens, num_rows, num_columns, dtype, options)
    for _ in range(2):  # the second launch finds the counters as the first left them
        out = torch.full((num_tokens, num_rows + 8), float("nan"), dtype=dtype, device=DEVICE)
        narrow_linear(x, weight, out=out[:, :num_rows], workspace=workspace, shape=shape, **given)  # type: ignore[arg-type]
        assert_close(out[:, :num_rows], oracle(x, weight, given))
        assert out[:, num_rows:].isnan().all()
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2"])
def test_other_gates_and_a_norm_of_1_plus_w_equal_the_reference(activation: str) -> None:
    x, weight, _ = operands(3, 24, 40, torch.float32, "gate and bias")
    linear, norm = Linear(weight, randn(48, seed=2)), Norm(randn(40, seed=4), EPS, plus_one=True)
    shapes = VectorShape(2, 16, 1), NarrowShape(16, 16, 2, 2, 1, 0)
    options = {"gated": True, "activation": activation}
    one = vector_linear(x[:1], weight, linear.bias, norm=norm, shape=shapes[0], **options)  # type: ignore[arg-type]
    assert_close(one, reference.norm_gated_linear(x[:1], norm, linear, activation).double())
    few = narrow_linear(x, weight, linear.bias, workspace=make_linear_workspace(DEVICE), shape=shapes[1], **options)  # type: ignore[arg-type]
    assert_close(few, reference.norm_gated_linear(x, None, linear, activation).double())


def test_a_norm_that_subtracts_the_mean_stands_alone() -> None:
    x, weight, _ = operands(1, 24, 40, torch.float32, "plain")
    with pytest.raises(ValueError, match="only an RMS norm"):
        vector_linear(x, weight, norm=Norm(x[0], EPS, centred=True))


def test_the_residual_may_be_overwritten() -> None:
    x, weight, given = operands(1, 24, 32, torch.float32, "residual")
    residual = given["residual"]
    assert isinstance(residual, torch.Tensor)
    expected = oracle(x, weight, given)
    assert_close(vector_linear(x, weight, residual=residual.clone(), shape=VectorShape(2, 16, 1)), expected)
    narrow_linear(
        x,
        weight,
        residual=residual,
        out=residual,
        workspace=make_linear_workspace(DEVICE),
        shape=NarrowShape(16, 16, 2, 2, 1, 0),
    )
    assert_close(residual, expected)


def test_refuses_what_does_not_fit() -> None:
    workspace = make_linear_workspace(DEVICE)
    with pytest.raises(ValueError, match="1 to 1 tokens"):
        vector_linear(randn(2, 8), randn(4, 8))
    with pytest.raises(ValueError, match="1 to 128 tokens"):
        narrow_linear(randn(129, 8), randn(4, 8), workspace=workspace)
    with pytest.raises(ValueError, match="do not fit each other"):
        narrow_linear(randn(2, 8), randn(4, 6), workspace=workspace)
    with pytest.raises(ValueError, match="residual"):
        vector_linear(randn(1, 8), randn(4, 8), residual=randn(1, 5))
    with pytest.raises(ValueError, match="one dtype"):
        vector_linear(randn(1, 8), randn(4, 8).half())
    with pytest.raises(ValueError, match="workspace"):
        narrow_linear(randn(2, 64), randn(80_000, 64), workspace=workspace, shape=NarrowShape(16, 16, 2, 2, 1, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_a_chain_of_dependent_launches_is_bit_equal_to_a_plain_one(num_tokens: int) -> None:
    """Programmatic dependent launch overlaps each kernel with the end of the one before; nothing may be read too
    early.
    """
    workspace = make_linear_workspace(DEVICE)
    weights = [randn(2048, 2048, dtype=torch.bfloat16, seed=seed, scale=0.02) for seed in range(4)]
    results = []
    for launch_pdl in (False, True):
        x, y = (
            randn(num_tokens, 2048, dtype=torch.bfloat16),
            torch.empty(num_tokens, 2048, dtype=torch.bfloat16, device=DEVICE),
        )
        for step in range(100):
            if num_tokens == 1:
                vector_linear(
                    x, weights[step % 4], residual=x, out=y, norm=Norm(weights[0][0], EPS), launch_pdl=launch_pdl
                )
            else:
                narrow_linear(x, weights[step % 4], residual=x, out=y, workspace=workspace, launch_pdl=launch_pdl)
            x, y = y, x
        results.append(x.clone())
    assert torch.equal(results[0], results[1])
    assert results[0].isfinite().all()
