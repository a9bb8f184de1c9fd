"""Random small blocks of quantized linears, lowered for Vulkan and run with its arithmetic.

The reference is float64 from the integers of the weights and of the rounded activations. The
runtime reads the activation of one token as floats, and so does the reference then.

Each value is held to what rounding may change, and results of 64 values and more to decibels:
100, or 66 where activations may round the other way. A float16 program rounds each result and
each stored scale to 11 bits, and sums weight-only products in half: 40. A bfloat16 one rounds its
results to 8 bits: 50.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import edgepass
from edgepass.lowering.vulkan_operators import has_operator
from edgepass.ops.errors import EdgepassError
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.random_blocks import (
    Block,
    BlockModule,
    blocks,
    example,
    export_block,
    folded,
    tied_blocks,
)
from tests.lowering.vulkan_files import delegates
from tests.lowering.vulkan_programs import sqnr_db
from tests.passes.quantized_programs import Form, QuantizedLinear, quantized_rows

# What one sum may lose, as a share of the sum of its terms' sizes: by the dtype of the program.
_LOSS = {torch.float32: 1e-5, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-7}
_DECIBELS = {torch.float32: 100, torch.float16: 40, torch.bfloat16: 50}
# Fewer values may all be small by cancellation, and then lose any number of decibels.
_MANY = 64
# How near to the middle of two steps float32 may round to either.
_NEAR = 5e-5


def check(block: Block) -> None:
    """Lower a block once and run it with each token count."""
    module = BlockModule(block)
    buffer = edgepass.lower(export_block(block), backend="vulkan").buffer
    found = delegates(buffer)
    assert all(has_operator(name) for each in found for name in each.operators)
    simulated = SimulatedProgram(buffer)
    for count in block.counts[: None if block.lead is not None else 1]:
        given = example(block, count)
        x = module.activation(given)
        got = iter(simulated.run([given]))
        for linear in module.linears:
            for each in (x, -x) if block.twice else (x,):
                check_result(block, linear, each, next(got))


def check_result(block: Block, linear: QuantizedLinear, x: Tensor, got: Tensor) -> None:
    """Compare with float64, value by value and as a whole."""
    rounds = linear.form.dynamic and math.prod(x.shape[:-1]) > 1
    weight = linear.float64_weight()
    seen = quantized_rows(x.float()) if rounds else x.double()
    wanted = seen @ weight.t()
    sizes = seen.abs() @ magnitude(linear).t()
    if linear.form.bias:
        wanted, sizes = wanted + linear.bias.double(), sizes + linear.bias.double().abs()
    allowed = _LOSS[block.dtype] * sizes
    ties = near_ties(x.float()) if rounds else torch.zeros(x.shape, dtype=torch.bool)
    if rounds:
        allowed = allowed + flips(x, weight, ties, block.dtype)
    decibels = sqnr_db(folded(wanted) if block.views else wanted, got)
    if block.views:
        wanted, allowed = folded(wanted), folded(allowed)
    assert got.shape == wanted.shape
    assert got.dtype == block.dtype
    assert ((got.double() - wanted).abs() <= allowed).all(), (got.double() - wanted).abs().max()
    if wanted.numel() >= _MANY:
        assert decibels >= least_decibels(block, ties)


def least_decibels(block: Block, ties: Tensor) -> float:
    """What a result must reach; a flip in few values costs more than 66 dB allow."""
    found, bound = int(ties.sum()), _DECIBELS[block.dtype]
    if not found:
        return bound
    return min(bound, 66) if ties.numel() >= 2000 * found else 0


def magnitude(linear: QuantizedLinear) -> Tensor:
    """How large the terms of a sum are before the zero points' share is taken off."""
    groups = linear.values.double().unflatten(1, (-1, linear.form.group)).abs() + 8
    sizes = groups + linear.zeros.double().unsqueeze(-1).abs()
    return (sizes * linear.scales.double().unsqueeze(-1)).flatten(1)


def steps_of(x: Tensor) -> Tensor:
    """The size of a row's steps, ``[.., 1]``."""
    high, low = x.amax(-1).clamp(min=0).double(), x.amin(-1).clamp(max=0).double()
    return ((high - low) / 255).unsqueeze(-1)


def near_ties(x: Tensor) -> Tensor:
    """Which activations lie so near to the middle of two steps that float32 may take either."""
    steps = x.double() / steps_of(x).clamp(min=1e-300)
    return ((steps - steps.floor()) - 0.5).abs() < _NEAR


def flips(x: Tensor, weight: Tensor, ties: Tensor, dtype: torch.dtype) -> Tensor:
    """What activations that round the other way may change, ``[.., N]``.

    In half precision the scale itself is rounded, and any of them may.
    """
    if dtype == torch.float16:
        return steps_of(x) * weight.abs().sum(1)
    return 1.01 * steps_of(x) * (ties.double() @ weight.abs().t())


_EXAMPLES = st.one_of(blocks(), blocks(), blocks(), tied_blocks())


@given(_EXAMPLES)
@settings(max_examples=100 if os.environ.get("CI") else 6)
def test_any_block(block: Block) -> None:
    check(block)


@pytest.mark.nightly
@given(_EXAMPLES)
@settings(max_examples=2000)
def test_any_block_at_length(block: Block) -> None:
    check(block)


def test_blocks_are_not_refused() -> None:
    """The property above would also hold of a lowering that refuses; nothing here may."""
    for lead in [(), (1,), (2, 2)]:
        block = Block((Form(columns=96, group=48, rows=13, asymmetric=True),), lead)
        try:
            check(block)
        except EdgepassError as error:
            pytest.fail(str(error))
