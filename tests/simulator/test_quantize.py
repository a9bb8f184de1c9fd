"""Per-token encodings: values by hand, the runtime's floor, and edgepass's own quantizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.ops.errors import SimulatorError
from edgepass.ops.quantize import VULKAN_SCALE_FLOOR, quantize_per_token
from edgepass.simulator.quantize import choose_qparams, quantize_rows
from tests.simulator.graphs import activation, one_call

FLOOR = torch.tensor(VULKAN_SCALE_FLOOR).item()


@pytest.mark.parametrize(
    ("row", "scale", "zero"),
    [
        ([0.0, 255.0], 1.0, -128),
        ([-255.0, 0.0], 1.0, 127),
        ([-51.0, 204.0], 1.0, -77),
        ([-1.0, -255.0], 1.0, 127),
        ([0.0, 0.0], 0.1, 127),  # no range: 0.1, and the zero point of its upper end
        ([0.0, 1e-6], FLOOR, -128),
        ([-1e-6, 0.0], FLOOR, 127),
        ([-1e-6, 1e-6], FLOOR, 0),
    ],
)
def test_by_hand(row: list[float], scale: float, zero: int) -> None:
    found_scale, found_zero = choose_qparams(torch.tensor([row]))
    assert found_scale.item() == pytest.approx(scale, rel=1e-7)
    assert found_zero.item() == zero or (row == [-1e-6, 1e-6] and found_zero.item() in (-1, 0))


def test_rows_near_a_millionth_are_flushed() -> None:
    rows = torch.randn(4, 32) * 1e-6
    scale, zero = choose_qparams(rows)
    assert torch.equal(quantize_rows(rows, scale, zero), zero.unsqueeze(1).expand(4, 32).float())


@given(st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e4]))
def test_agrees_with_edgepass_quantizer(seed: int, size: float) -> None:
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * size
    scale, zero = choose_qparams(rows)
    q, own_scale, own_zero = quantize_per_token(rows, VULKAN_SCALE_FLOOR)
    assert torch.equal(scale, own_scale)
    # The runtime rounds the zero point of one end or of the other, so that a value at the other end
    # may be clamped a step earlier or later. (Below the floor the zero points differ freely.)
    steps = quantize_rows(rows, scale, zero) - zero.unsqueeze(1)
    differences = (steps - (q.float() - own_zero.unsqueeze(1))).abs()
    assert differences.max() <= 1
    assert (differences > 0).sum() <= 4


@pytest.mark.parametrize(
    ("shape", "block", "words"),
    [
        ((2, 3, 8), [1, 1, 8], "takes one matrix"),
        ((3, 8), [1, 4], "one block a token"),
        ((3, 6), [1, 6], "takes one matrix"),
    ],
)
def test_what_the_runtime_does_not_load_is_named(
    shape: tuple[int, ...], block: list[int], words: str
) -> None:
    arguments = [activation(*shape), "ASYMMETRIC", block, None, -128, 127, None, None, None]
    results = activation(*shape[:-1]), activation(*shape[:-1], dtype=torch.int8)
    with pytest.raises(SimulatorError, match=words):
        one_call("torchao.choose_qparams_affine.default", arguments, *results)


def test_encodings_have_the_shape_that_the_program_says() -> None:
    arguments = [activation(1, 9, 8), "ASYMMETRIC", [1, 1, 8], None, -128, 127, None, None, None]
    results = activation(1, 9), activation(1, 9, dtype=torch.int8)
    delegate = one_call("torchao.choose_qparams_affine.default", arguments, *results)
    scale, zero = delegate.run([torch.randn(1, 5, 8)])
    assert (scale.shape, zero.shape, zero.dtype) == ((1, 5), (1, 5), torch.int8)


def test_encodings_of_one_token_are_chosen_where_they_can_be_seen() -> None:
    arguments = [activation(9, 8), "ASYMMETRIC", [1, 8], None, -128, 127, None, None, None]
    results = activation(9), activation(9, dtype=torch.int8)
    delegate = one_call("torchao.choose_qparams_affine.default", arguments, *results)
    row = torch.tensor([[0.0, 255.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    scale, zero = delegate.run([row])
    assert (scale.tolist(), zero.tolist()) == ([1.0], [-128])
