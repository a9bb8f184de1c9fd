"""Rounding without data: what the results are, that searching pays, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quant_primitives import MappingType

from edgepass.calibration.grids import MAPPINGS, integer_range
from edgepass.calibration.scale_search import search_scales
from edgepass.calibration.weight_rounding import quantize_weight
from edgepass.ops.errors import InvalidArgumentError
from tests.calibration.rounding_cases import Spec, random_weight

DATA_FREE = ("rtn", "mse")
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 8, 32]))


def squared_error(weight: torch.Tensor, rounded) -> torch.Tensor:
    """Squared error a group, ``[N, G]``, in float64 by the definition of the grid."""
    values = rounded.values.double().unflatten(1, (rounded.scale.shape[1], -1))
    zero = 0 if rounded.zero_point is None else rounded.zero_point.double().unsqueeze(-1)
    exact = (values - zero) * rounded.scale.double().unsqueeze(-1)
    return (exact - weight.double().view_as(exact)).square().sum(-1)


@given(SHAPES, st.sampled_from(MAPPINGS), st.sampled_from(DATA_FREE), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_integers_scales_and_zero_points(shape, mapping: str, algorithm: str, bits: int) -> None:
    rows, groups, size = shape
    weight = random_weight(rows, groups * size, 3)
    found = quantize_weight(weight, Spec(bits, size, mapping, algorithm))
    low, high = integer_range(bits)
    assert found.values.dtype == torch.int8 and found.values.shape == weight.shape
    assert found.values.min() >= low and found.values.max() <= high
    assert found.scale.dtype == torch.float32 and found.scale.shape == (rows, groups)
    if mapping == "symmetric":
        assert found.zero_point is None
    else:
        dtype = torch.int8 if mapping == "asymmetric" else torch.float32
        assert found.zero_point.dtype == dtype and found.zero_point.shape == (rows, groups)
    assert torch.isfinite(found.dequantize()).all()


@given(SHAPES, st.sampled_from(MAPPINGS), st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_search_is_no_worse_than_rounding_to_nearest(shape, mapping, bits, seed) -> None:
    rows, groups, size = shape
    weight = random_weight(rows, groups * size, seed)
    nearest = squared_error(weight, quantize_weight(weight, Spec(bits, size, mapping, "rtn")))
    searched = squared_error(weight, quantize_weight(weight, Spec(bits, size, mapping, "mse")))
    assert (searched <= nearest * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_search_pays(mapping: str) -> None:
    weight = random_weight(64, 256, 1)
    nearest, searched = (
        squared_error(weight, quantize_weight(weight, Spec(4, 32, mapping, name))).sum()
        for name in DATA_FREE
    )
    assert searched < 0.95 * nearest


def test_a_symmetric_scale_takes_the_sign_that_serves() -> None:
    # +8 at the end with the extra step needs a negative scale: then nothing is lost.
    weight = torch.arange(-7.0, 9.0).reshape(1, 16)
    found = quantize_weight(weight, Spec(4, 16, "symmetric", "mse"))
    assert found.scale.item() == -1
    assert torch.equal(found.dequantize(), weight)


def test_importance_moves_the_error_to_where_it_is_cheap() -> None:
    weight, importance = random_weight(32, 64, 2), torch.ones(64)
    importance[::2] = 100
    plain = search_scales(weight, Spec(), None).dequantize() - weight
    weighted = search_scales(weight, Spec(), importance).dequantize() - weight
    assert (weighted.square() @ importance).sum() < (plain.square() @ importance).sum()


@given(st.integers(0, 99), st.floats(1e-3, 10), st.floats(-10, 10))
@settings(max_examples=30, deadline=None)
def test_a_grid_of_scale_and_minimum_is_found_again(seed: int, scale: float, low: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 16, (4, 64), generator=generator).float()
    steps[:, ::32], steps[:, 1::32] = 0, 15  # as in llama.cpp's Q4_1, both ends are in use
    weight = steps * scale + low
    for algorithm in DATA_FREE:
        found = quantize_weight(weight, Spec(4, 32, "float_offset", algorithm))
        assert torch.equal(found.values, (steps - 8).to(torch.int8))
        tolerance = 4 * torch.finfo(torch.float32).eps * (16 * scale + abs(low))
        assert (found.dequantize() - weight).abs().max() <= tolerance


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("algorithm", DATA_FREE)
def test_groups_of_one_value(mapping: str, algorithm: str) -> None:
    weight = torch.tensor([[0.0], [3.5], [-3.5]]).expand(3, 8).contiguous()
    found = quantize_weight(weight, Spec(4, 8, mapping, algorithm)).dequantize()
    assert (found - weight).abs().max() <= 3.5 / 14


@pytest.mark.parametrize("mapping", ["symmetric", "asymmetric"])
def test_rounding_to_nearest_is_torchaos(mapping: str) -> None:
    weight = random_weight(8, 64, 5)
    kinds = {
        "symmetric": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        "asymmetric": MappingType.ASYMMETRIC,
    }
    expected = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, 32),
        torch.int4,  # type: ignore[attr-defined]
        mapping_type=kinds[mapping],
    )
    found = quantize_weight(weight, Spec(4, 32, mapping))
    assert torch.equal(found.values, expected.qdata)
    assert torch.equal(found.scale, expected.scale)
    if mapping == "asymmetric":
        assert torch.equal(found.zero_point, expected.zero_point)


def test_large_weights_are_searched_block_by_block() -> None:
    weight = random_weight(40, 1 << 16, 7)
    whole = search_scales(weight, Spec(4, 1 << 15))
    alone = search_scales(weight[33:34].contiguous(), Spec(4, 1 << 15))
    assert torch.equal(whole.values[33:34], alone.values)


@pytest.mark.parametrize(
    ("weight", "spec", "message"),
    [
        (torch.ones(4, 6), Spec(group_size=4), "group_size=4, accepted are divisors of the 6"),
        (torch.ones(4, 6), Spec(group_size=3, bits=9), "bits=9, accepted are 2 to 8"),
        (torch.ones(4, 6), Spec(group_size=3, mapping="affine"), "mapping='affine', accepted are"),
        (torch.ones(4, 6), Spec(group_size=3, algorithm="awq"), "algorithm='awq', accepted are"),
        (torch.ones(4, 6, dtype=torch.int8), Spec(), "torch.int8"),
        (torch.full((4, 6), torch.nan), Spec(group_size=3), "NaN"),
    ],
)
def test_bad_input_is_refused(weight: torch.Tensor, spec: Spec, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        quantize_weight(weight, spec)
