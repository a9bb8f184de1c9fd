"""The int4 linears against exact integer arithmetic, on both sides of every choice of routine."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import reference
from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import (
    FLOATS,
    ROUNDING,
    Weight,
    leads,
    make_tokens,
    make_weight,
    seeds,
    sqnr_db,
    weights,
)

ops = torch.ops.edgepass
BOUND_DB = 120


def run_all(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """The output of the three operators for one float activation."""
    quantized = ops.quantize_per_token(x)
    arguments = weight.arguments()
    return (
        ops.linear_qta8a_qga4w(*quantized, *arguments),
        ops.linear_qta8a_qga4w.dynamic(x, *arguments),
        ops.linear_qga4w(x, *arguments),
    )


def run_references(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    quantized = ops.quantize_per_token(x)
    arguments = weight.arguments()
    return (
        reference.linear_qta8a_qga4w(*quantized, *arguments),
        reference.linear_qga4w(x, *arguments),
    )


def assert_within_bound(x: Tensor, weight: Weight) -> None:
    exact, exact_weight_only = run_references(x, weight)
    static, dynamic, weight_only = run_all(x, weight)
    assert torch.equal(static, dynamic)
    assert sqnr_db(exact, static) >= BOUND_DB
    assert sqnr_db(exact_weight_only, weight_only) >= BOUND_DB


@settings(max_examples=100)
@given(lead=leads(), weight=weights(), seed=seeds, offset=st.sampled_from([0.0, 5.0, -5.0]))
def test_small_products(lead: tuple[int, ...], weight: Weight, seed: int, offset: float) -> None:
    x = make_tokens((*lead, weight.values.shape[1]), torch.float32, seed, offset)
    assert_within_bound(x, weight)


@given(
    rows=st.sampled_from([1, 2, 7, 33]),
    n=st.integers(300, 400),
    groups=st.integers(5, 20),
    group_size=st.sampled_from([31, 32, 64]),
    asymmetric=st.booleans(),
    fraction=st.sampled_from([0.0, 0.37]),
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 5.0]),
    seed=seeds,
)
def test_products_that_are_done_in_float32(
    rows: int,
    n: int,
    groups: int,
    group_size: int,
    asymmetric: bool,
    fraction: float,
    bias: bool,
    offset: float,
    seed: int,
) -> None:
    encoding = {"asymmetric": asymmetric, "fraction": fraction}
    weight = make_weight(n, groups, group_size, **encoding, bias=bias, seed=seed)
    x = make_tokens((rows, groups * group_size), torch.float32, seed, offset)
    assert_within_bound(x, weight)  # the first call of a weight, and then the kept form
    assert_within_bound(x, weight)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("group_size", [32, 128, 8192])
def test_long_sums(rows: int, group_size: int) -> None:
    weight = make_weight(96, 8192 // group_size, group_size, bias=True, seed=rows)
    assert_within_bound(make_tokens((rows, 8192), torch.float32, group_size), weight)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_longest_sums_of_one_sign(rows: int) -> None:
    # Every product is 255 * 15: the sums grow to 2^25 and beyond.
    weight = make_weight(80, 128, 64)
    weight.packed.fill_(0)
    weight.zeros.fill_(7)
    x = torch.full((rows, 8192), 127, dtype=torch.int8)
    scale, zero = torch.ones(rows), torch.full((rows,), -128, dtype=torch.int8)
    exact = reference.linear_qta8a_qga4w(x, scale, zero, *weight.arguments())
    assert sqnr_db(exact, ops.linear_qta8a_qga4w(x, scale, zero, *weight.arguments())) >= BOUND_DB


@pytest.mark.parametrize("k", [576, 1536, 2048, 8192])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_equal_products_of_one_token(k: int, seed: int) -> None:
    # The hardest sums: each addition is rounded the same way, and the errors add up.
    scales = torch.rand(2, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01
    weight = make_weight(300, k // 32, 32)
    weight.packed.fill_(0)
    weight.zeros.fill_(7)
    weight.scales.copy_(scales[0])
    x = torch.full((1, k), 127, dtype=torch.int8)
    encoding = scales[1:], torch.full((1,), -128, dtype=torch.int8)
    exact = reference.linear_qta8a_qga4w(x, *encoding, *weight.arguments())
    assert sqnr_db(exact, ops.linear_qta8a_qga4w(x, *encoding, *weight.arguments())) >= BOUND_DB


@pytest.mark.parametrize("k", [521, 521 * 2, 7 * 256, 47 * 16])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_token_of_any_length(k: int, lead: tuple[int, ...], bias: bool) -> None:
    weight = make_weight(300, 1, k, bias=bias, seed=k)
    x = make_tokens((*lead, k), torch.float32, k)
    assert_within_bound(x, weight)
    assert ops.linear_qga4w(x, *weight.arguments()).shape == (*lead, 300)


@pytest.mark.parametrize("n", [3, 400])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_activations_of_extreme_magnitude(n: int, magnitude: float) -> None:
    x = make_tokens((4, 640), torch.float32, 0) * magnitude
    assert_within_bound(x, make_weight(n, 20, 32, seed=1))


def test_small_sums_that_cancel_are_exactly_zero() -> None:
    weight = make_weight(1, 1, 3, asymmetric=False)
    weight.packed.copy_(torch.tensor([[(2 + 8) + 16 * (-3 + 8), 0 + 8 + 16 * 8]]))
    x = torch.tensor([[3, 2, 5]], dtype=torch.int8)
    out = ops.linear_qta8a_qga4w(
        x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int8), *weight.arguments()
    )
    assert out.item() == 0


@given(
    lead=leads(1),
    n=st.sampled_from([5, 300]),
    x_dtype=st.sampled_from(FLOATS),
    w_dtype=st.sampled_from(FLOATS),
    seed=seeds,
)
def test_every_dtype_is_rounded_once(
    lead: tuple[int, ...], n: int, x_dtype: torch.dtype, w_dtype: torch.dtype, seed: int
) -> None:
    weight = make_weight(n, 15, 32, dtype=w_dtype, bias=True, seed=seed)
    x = make_tokens((*lead, 480), x_dtype, seed)
    exact, exact_weight_only = run_references(x, weight)
    static, dynamic, weight_only = run_all(x, weight)
    assert torch.equal(static, dynamic)
    for value, wanted in ((static, exact), (weight_only, exact_weight_only)):
        assert value.dtype == w_dtype
        error = (value.double() - wanted).abs()
        slack = 2.0**-18 * wanted.abs().mean()
        assert (error <= ROUNDING[w_dtype] * wanted.abs() + slack).all()


@pytest.mark.parametrize("n", [3, 400])
def test_int32_zero_points(n: int) -> None:
    weight = make_weight(n, 20, 32)
    q, scale, zero = ops.quantize_per_token(make_tokens((2, 3, 640), torch.float32, 0))
    narrow = ops.linear_qta8a_qga4w(q, scale, zero, *weight.arguments())
    assert torch.equal(ops.linear_qta8a_qga4w(q, scale, zero.int(), *weight.arguments()), narrow)


@pytest.mark.parametrize("n", [3, 400])
def test_non_contiguous_operands(n: int) -> None:
    weight = make_weight(n, 20, 32, bias=True)
    x = make_tokens((640, 6), torch.float32, 0).t()
    spread = Weight(
        weight.values,
        weight.packed.t().contiguous().t(),
        32,
        weight.scales.t().contiguous().t(),
        weight.zeros.t().contiguous().t(),
        weight.bias,
    )
    for value, wanted in zip(run_all(x, spread), run_all(x.contiguous(), weight), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_tokens(lead: tuple[int, ...]) -> None:
    for value in run_all(torch.empty(*lead, 64), make_weight(5, 2, 32, bias=True)):
        assert value.shape == (*lead, 5)


def test_a_gradient_is_not_asked_for() -> None:
    x = make_tokens((4, 640), torch.float32, 0).requires_grad_()
    weight = make_weight(400, 20, 32)
    assert torch.equal(run_all(x, weight)[1], run_all(x.detach(), weight)[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("lead", "n", "groups", "group_size", "dtype"),
    [
        ((), 5, 2, 3, torch.float32),
        ((3,), 5, 1, 7, torch.float16),
        ((2, 3), 300, 15, 32, torch.float32),
        ((2, 1, 3), 4, 2, 8, torch.bfloat16),
    ],
)
def test_opcheck(
    lead: tuple[int, ...], n: int, groups: int, group_size: int, dtype: torch.dtype, bias: bool
) -> None:
    weight = make_weight(n, groups, group_size, dtype=dtype, bias=bias)
    x = make_tokens((*lead, groups * group_size), dtype, 0)
    arguments = weight.arguments()
    quantized = ops.quantize_per_token(x)
    torch.library.opcheck(ops.linear_qta8a_qga4w.default, (*quantized, *arguments))
    torch.library.opcheck(ops.linear_qta8a_qga4w.dynamic, (x, *arguments))
    torch.library.opcheck(ops.linear_qga4w.default, (x, *arguments))


class Projection(torch.nn.Module):
    """A linear as a lowered module holds it: the weight in buffers."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_qta8a_qga4w.dynamic(x, self.packed, 32, self.scales, self.zeros)


def test_export_with_dynamic_tokens() -> None:
    module = Projection(make_weight(300, 15, 32))
    tokens = torch.export.Dim("tokens", min=1, max=64)
    sample = make_tokens((1, 7, 480), torch.float32, 0)
    exported = torch.export.export(module, (sample,), dynamic_shapes=({1: tokens},)).module()
    for count in (1, 7, 64):
        x = make_tokens((1, count, 480), torch.float32, count)
        assert torch.equal(exported(x), module(x))


def refused(**changes: Any) -> dict[str, Any]:
    """The operands of ``linear_qta8a_qga4w`` with some of them replaced by wrong ones."""
    weight = make_weight(6, 4, 8)
    q, scale, zero = ops.quantize_per_token(make_tokens((3, 32), torch.float32, 0))
    operands: dict[str, Any] = {
        "x_q": q,
        "x_scale": scale,
        "x_zero": zero,
        "w_packed": weight.packed,
        "group_size": 8,
        "w_scales": weight.scales,
        "w_zeros": weight.zeros,
        "bias": torch.zeros(6),
    }
    return operands | changes


BAD_OPERANDS = [
    ({"group_size": 5}, r"got group_size=5; expected a divisor of K=32"),
    ({"group_size": 0}, r"got group_size=0; expected a divisor of K=32"),
    ({"group_size": 16}, r"got w_scales.shape=\[6, 4\]; expected \[6, 2\]"),
    ({"x_q": torch.zeros(3, 32)}, r"got x_q.dtype=float32; expected int8"),
    ({"x_q": torch.zeros(3, 0, dtype=torch.int8)}, r"got x_q.shape=\[3, 0\]"),
    ({"x_scale": torch.ones(3, 1)}, r"got x_scale.shape=\[3, 1\]; expected \[3\]"),
    ({"x_zero": torch.zeros(3)}, r"got x_zero.dtype=float32; expected int8 or int32"),
    ({"w_packed": torch.zeros(6, 16)}, r"got w_packed.dtype=float32; expected uint8"),
    ({"w_packed": torch.zeros(6, 15, dtype=torch.uint8)}, r"got w_packed.shape=\[6, 15\]"),
    ({"w_packed": torch.zeros(16, dtype=torch.uint8)}, r"got w_packed.shape=\[16\]"),
    ({"w_scales": torch.ones(6, 4, dtype=torch.float64)}, r"got w_scales.dtype=float64"),
    ({"w_zeros": torch.zeros(6, 4).int()}, r"got w_zeros.dtype=int32; expected int8 or float"),
    ({"w_zeros": torch.zeros(6, 3, dtype=torch.int8)}, r"got w_zeros.shape=\[6, 3\]"),
    ({"bias": torch.zeros(5)}, r"got bias.shape=\[5\]; expected \[6\]"),
    ({"bias": torch.zeros(6, dtype=torch.int32)}, r"got bias.dtype=int32"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changes", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(changes: dict[str, Any], message: str, device: str) -> None:
    operands = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in refused(**changes).items()
    }
    with pytest.raises(InvalidArgumentError, match=f"linear_qta8a_qga4w: {message}"):
        ops.linear_qta8a_qga4w(**operands)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["linear_qga4w", "linear_qta8a_qga4w.dynamic"])
def test_a_bad_float_activation_is_refused(name: str, device: str) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(ops, packet), overload or "default")
    weight = [
        value.to(device) if isinstance(value, Tensor) else value
        for value in make_weight(6, 4, 8).arguments()
    ]
    with pytest.raises(InvalidArgumentError, match=f"{packet}: got x.dtype=float64"):
        operator(torch.zeros(3, 32, dtype=torch.float64, device=device), *weight)
    with pytest.raises(InvalidArgumentError, match=f"{packet}: got group_size=8; .* K=33"):
        operator(torch.zeros(3, 33, device=device), *weight)
