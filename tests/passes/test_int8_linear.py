"""Linears of int8 weights, in both dialects and every spelling, as one operator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.int8_linear import FuseInt8Linear
from edgepass.passes.quantized_linear import FuseQuantizedLinear, ShareActivationQuantization
from tests.ops.cases import sqnr_db
from tests.passes.programs import count, export, run_passes
from tests.passes.quantized_programs import Form, QuantizedLinear
from tests.passes.test_quantized_linear import reference

PASSES = [Canonicalize(), ShareActivationQuantization(), FuseQuantizedLinear(), FuseInt8Linear()]
INT8 = "edgepass.linear_qta8a_qc8w"


def wide(**fields) -> Form:
    return Form(low=-128, high=127, **fields)


def fuse(module, x):
    return run_passes(PASSES, export(module, (x,)), (x,))


@given(
    dialect=st.sampled_from(["torchao", "decomposed"]),
    spelling=st.sampled_from(["linear", "matmul", "addmm", "mm", "bmm"]),
    columns=st.sampled_from([16, 32, 96]),
    bias=st.booleans(),
    tokens=st.integers(1, 4),
    seed=st.integers(0, 50),
)
def test_every_form_becomes_one_operator(dialect, spelling, columns, bias, tokens, seed) -> None:
    torch.manual_seed(seed)
    form = wide(dialect=dialect, spelling=spelling, columns=columns, group=columns, bias=bias)
    module, x = QuantizedLinear(form, seed), torch.randn(2, tokens, columns)
    program, log = fuse(module, x)
    assert count(program, INT8) == 1
    assert log.counts["int8-linear"].applied == 1
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0
    _, again = fuse(program.to_exported().module(), x)
    assert again.counts["int8-linear"].applied == 0


@pytest.mark.parametrize("dialect", ["torchao", "decomposed"])
def test_tiny_rows_keep_the_least_scale_of_their_dialect(dialect) -> None:
    module, x = QuantizedLinear(wide(dialect=dialect, group=32)), torch.randn(3, 32) * 1e-7
    program, _ = fuse(module, x)
    assert count(program, INT8) == 1
    assert sqnr_db(module(x), program.to_exported().module()(x)) >= 100.0


def test_scales_of_float64_by_channel_are_taken() -> None:
    module, x = QuantizedLinear(wide(dialect="decomposed", group=32)), torch.randn(3, 32)
    module.channel_scales = module.channel_scales.double()
    program, _ = fuse(module, x)
    assert count(program, INT8) == 1
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (wide(group=16), "groups of 16"),
        (wide(group=32, asymmetric=True), "zero points"),
        (wide(group=32, dtype=torch.float16), "float32"),
    ],
)
def test_declines_with_the_reason(form, why) -> None:
    module, x = QuantizedLinear(form), torch.randn(3, 32).to(form.dtype)
    program, log = fuse(module, x)
    assert count(program, INT8) == 0
    assert any(why in each.reason for each in log.refusals), [r.reason for r in log.refusals]


def test_a_weight_of_four_bits_is_left_to_its_own_operator() -> None:
    module, x = QuantizedLinear(Form(group=32)), torch.randn(3, 32)
    program, _ = fuse(module, x)
    assert (count(program, INT8), count(program, "edgepass.linear_qta8a_qga4w")) == (0, 1)
