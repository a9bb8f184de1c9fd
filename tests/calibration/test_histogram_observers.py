"""Histograms by powers of two: what they count, how they add up, which range they choose."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.calibration.histogram_observers import LeastErrorObserver, PercentileObserver

BINS = 16
sizes = st.floats(2.0**-40, 2.0**40, width=32)
values = st.lists(st.just(0.0) | sizes | sizes.map(float.__neg__), min_size=1, max_size=12)
parts = st.lists(values, min_size=1, max_size=5)


def observer(kind=PercentileObserver, **options):
    options = {"bins": BINS, "dtype": torch.uint8, "eps": 1e-30} | options
    return kind(**options)


def seen(*batches, **options):
    found = observer(**options)
    for batch in batches:
        found(torch.as_tensor(batch, dtype=torch.float32))
    return found


def state(found):
    return [each.tolist() for each in found.state_dict().values()]


@given(parts)
def test_counts_are_those_of_exact_arithmetic(batches) -> None:
    found = seen(*batches)
    every = [float(torch.tensor(x, dtype=torch.float32)) for batch in batches for x in batch]
    largest = max(map(abs, every))
    if largest == 0:
        assert int(found.counts[BINS // 2]) == len(every)
        return
    exponent = max(-100, math.frexp(largest)[1] - int(math.log2(BINS // 2)))
    assert int(found.exponent) == exponent
    expected = [0] * BINS
    for x in every:
        # Exact: a float by a power of two in integers.
        numerator, denominator = x.as_integer_ratio()
        shift = max(-exponent, 0), max(exponent, 0)
        expected[(numerator << shift[0]) // (denominator << shift[1]) + BINS // 2] += 1
    assert found.counts.tolist() == expected


@given(parts, st.randoms())
def test_order_does_not_matter_and_parts_add_up_bit_by_bit(batches, random) -> None:
    whole = seen(*batches)
    shuffled = random.sample(batches, len(batches))
    assert state(seen(*shuffled)) == state(whole)
    each = [seen(batch) for batch in shuffled]
    each[0].merge([other.state_dict() for other in each[1:]])
    assert state(each[0]) == state(whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_extremes_alone(bad) -> None:
    found = seen([1.0, 2.0], [bad, 1.0])
    assert not (found.min_val.isfinite() and found.max_val.isfinite())
    assert int(found.counts.sum()) == 2


def test_the_percentile_leaves_out_as_much_at_either_end() -> None:
    ramp = torch.arange(-1000, 1000) / 1000
    low, high = seen(ramp, percentile=90.0, bins=2048).chosen_range()
    step = 2.0**-10
    assert abs(low + 0.9) <= 2 * step and abs(high - 0.899) <= 2 * step
    assert (ramp < low).sum() <= 100 and (ramp > high).sum() <= 100


def test_all_percent_are_the_extremes() -> None:
    data = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    low, high = seen(data, percentile=100.0).chosen_range()
    assert (low, high) == (data.min(), data.max())


def rounding_error(data, low, high, levels=255):
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = (high - low) / levels
    zero = round(-low / scale)
    q = (data / scale).round().add(zero).clamp(0, levels)
    return (((q - zero) * scale - data) ** 2).sum().item()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("levels", [15, 255])
def test_the_least_error_is_near_the_best_of_a_search_over_the_data(together, levels) -> None:
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    data[0] = 12.0  # one outlier, on one side
    options = {"quant_min": 0, "quant_max": levels, "together": together, "bins": 2048}
    found = seen(data, kind=LeastErrorObserver, **options)
    error = rounding_error(data, *found.chosen_range(), levels)
    factors = torch.arange(1, 101) / 100
    wide = rounding_error(data, data.min(), data.max(), levels)
    best = min(rounding_error(data, f * data.min(), f * 12.0, levels) for f in factors.tolist())
    # The expected error of a histogram is not the data's own: 5 % for the model of the error.
    assert error <= 1.05 * best and error <= wide
    if levels == 15:
        assert error < 0.5 * wide


@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("kind", [LeastErrorObserver, PercentileObserver])
def test_encodings_cover_the_chosen_range(kind, scheme) -> None:
    data = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    found = seen(data, kind=kind, qscheme=scheme, quant_min=0, quant_max=255)
    (scale,), (zero,) = found.calculate_qparams()
    low, high = found.chosen_range()
    assert -zero * scale <= low + scale and (255 - zero) * scale >= high - scale


def test_zeros_alone_have_an_encoding() -> None:
    for kind in (LeastErrorObserver, PercentileObserver):
        scale, _ = seen([0.0, 0.0], kind=kind).calculate_qparams()
        assert scale.isfinite().all() and (scale > 0).all()
