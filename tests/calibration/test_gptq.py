"""GPTQ, SeqMSE and the descent: less output error on correlated inputs, groups where they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.calibration.gptq import gptq
from edgepass.calibration.grids import MAPPINGS, RoundedWeight
from edgepass.calibration.input_statistics import InputStatistics, convolution_inputs
from edgepass.calibration.output_descent import descend
from edgepass.calibration.weight_rounding import quantize_weight
from edgepass.ops.errors import CalibrationError
from tests.calibration.rounding_cases import Spec, correlated_inputs, random_weight


def output_error(weight: torch.Tensor, rounded: RoundedWeight, inputs: torch.Tensor) -> float:
    """Squared error of the layer's output over ``inputs``, in float64."""
    zero = 0 if rounded.zero_point is None else rounded.zero_point.double().unsqueeze(-1)
    values = rounded.values.double().unflatten(1, (rounded.scale.shape[1], -1)) - zero
    exact = (values * rounded.scale.double().unsqueeze(-1)).flatten(1)
    return float((inputs.double() @ (exact - weight.double()).t()).square().sum())


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("size", [16, 32, None])
def test_each_algorithm_beats_the_one_that_knows_less(mapping: str, size: int | None) -> None:
    weight, inputs = random_weight(96, 64, 1), correlated_inputs(512, 64, 2)
    statistics = InputStatistics.of(inputs)
    error = {
        name: output_error(
            weight, quantize_weight(weight, Spec(4, size, mapping, name), statistics), inputs
        )
        for name in ("rtn", "mse", "seqmse", "gptq")
    }
    assert error["gptq"] < 0.5 * error["seqmse"]
    assert error["seqmse"] < 0.9 * error["rtn"]
    assert error["gptq"] < 0.5 * error["mse"]


@given(st.integers(0, 999), st.sampled_from(MAPPINGS), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_the_descent_never_goes_up(seed: int, mapping: str, bits: int) -> None:
    weight, inputs = random_weight(12, 32, seed), correlated_inputs(64, 32, seed + 1)
    rounded = quantize_weight(weight, Spec(bits, 8, mapping, "rtn"))
    moments = (inputs.t() @ inputs / 64 + 0.01 * torch.eye(32)).float()
    last = None
    for sweeps in (0, 1, 2):
        found = descend(weight, rounded, moments, bits, sweeps)
        difference = (found.dequantize() - weight).double()
        error = ((difference @ moments.double()) * difference).sum()
        assert last is None or error <= last * (1 + 1e-4) + 1e-6
        last = error


def test_without_correlation_gptq_is_the_scale_search() -> None:
    # Second moments that are a multiple of one: no column can make up for another.
    weight = random_weight(32, 64, 3)
    statistics = InputStatistics(torch.eye(64) * 7, 7)
    found = gptq(weight, Spec(4, 16), statistics, sweeps=0)
    expected = quantize_weight(weight, Spec(4, 16, algorithm="mse"))
    assert torch.equal(found.values, expected.values)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)


def test_activation_order_keeps_groups_of_neighbours() -> None:
    """One group with large weights, one with small: scales must stay with their columns."""
    weight, inputs = random_weight(24, 64, 4), correlated_inputs(256, 64, 5)
    weight[:, 32:] *= 1000
    inputs[:, ::2] *= 30  # the order takes columns of both groups in turn
    statistics = InputStatistics.of(inputs)
    ordered = gptq(weight, Spec(), statistics, sweeps=0)
    assert ordered.scale.shape == (24, 2)
    assert (ordered.scale[:, 1].abs() > 100 * ordered.scale[:, 0].abs()).all()
    plain = output_error(weight, quantize_weight(weight, Spec()), inputs)
    assert output_error(weight, ordered, inputs) < 0.5 * plain


def test_a_permutation_of_the_inputs_changes_nothing() -> None:
    """With one group a row, activation order makes the result independent of the columns' order."""
    weight, inputs = random_weight(16, 32, 6), correlated_inputs(256, 32, 7)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    found = gptq(weight, Spec(4, None), InputStatistics.of(inputs), sweeps=0)
    moved = gptq(weight[:, order], Spec(4, None), InputStatistics.of(inputs[:, order]), sweeps=0)
    assert (moved.values == found.values[:, order]).float().mean() > 0.99


def test_the_same_data_give_the_same_bits() -> None:
    weight, statistics = random_weight(48, 96, 8), InputStatistics.of(correlated_inputs(99, 96, 9))
    first, second = (gptq(weight, Spec(), statistics) for _ in range(2))
    assert torch.equal(first.values, second.values) and torch.equal(first.scale, second.scale)


def test_inputs_that_are_always_zero_are_harmless() -> None:
    inputs = correlated_inputs(128, 64, 3)
    inputs[:, 5:9] = 0
    weight = random_weight(16, 64, 3)
    found = gptq(weight, Spec(), InputStatistics.of(inputs))
    nearest = quantize_weight(weight, Spec())
    assert output_error(weight, found, inputs) < output_error(weight, nearest, inputs)
    assert (found.dequantize() - weight)[:, 5:9].abs().max() <= weight.abs().max()


@pytest.mark.parametrize("algorithm", ["seqmse", "gptq"])
def test_a_convolution_is_a_linear_of_its_patches(algorithm: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 10, 3, stride=2, padding=1, dilation=1, bias=False)
    images = correlated_inputs(4 * 9 * 9, 6, 1).reshape(4, 9, 9, 6).permute(0, 3, 1, 2).contiguous()
    weight = layer.weight.detach().flatten(1)
    patches = convolution_inputs(images, layer)
    expected = layer(images).permute(0, 2, 3, 1).reshape(-1, 10)
    assert torch.allclose(patches @ weight.t(), expected, atol=1e-4)
    statistics = InputStatistics.of(patches)
    found = quantize_weight(weight, Spec(4, None, algorithm=algorithm), statistics)
    plain = quantize_weight(weight, Spec(4, None, algorithm="mse"))
    errors = [output_error(weight, each, patches) for each in (found, plain)]
    assert errors[0] < errors[1]


def test_convolutions_that_are_no_linear_are_refused() -> None:
    with pytest.raises(CalibrationError, match="groups=2"):
        convolution_inputs(torch.ones(1, 4, 5, 5), torch.nn.Conv2d(4, 4, 3, groups=2))


@pytest.mark.parametrize("algorithm", ["seqmse", "gptq"])
def test_bad_statistics_are_refused(algorithm: str) -> None:
    weight, spec = random_weight(8, 32, 0), Spec(4, 16, algorithm=algorithm)
    with pytest.raises(CalibrationError, match="got inputs of 64 features, accepted are the 32"):
        quantize_weight(weight, spec, InputStatistics(torch.eye(64), 5))
    with pytest.raises(CalibrationError, match="NaN"):
        quantize_weight(weight, spec, InputStatistics(torch.eye(32) * torch.nan, 5))


def test_hqq_beats_rounding_with_outliers() -> None:
    weight = random_weight(64, 64, 12)
    for mapping in ("symmetric", "float_offset"):
        nearest, found = (
            quantize_weight(weight, Spec(4, 32, mapping, name)).dequantize() - weight
            for name in ("rtn", "hqq")
        )
        assert found.abs().mean() < nearest.abs().mean()
