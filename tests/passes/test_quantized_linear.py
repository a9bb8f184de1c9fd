"""Fusion of quantized linears: both dialects, every spelling, the numbers, sharing, tying."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.quantized_linear import (
    FuseQuantizedLinear,
    ShareActivationQuantization,
    explain_linears,
)
from tests.passes.programs import count, export, find, reasons, run_passes, sqnr_db
from tests.passes.quantized_programs import Form, QuantizedLinear, quantized_rows

PASSES = [Canonicalize(), ShareActivationQuantization(), FuseQuantizedLinear()]
HUB, WEIGHT_ONLY = "edgepass.linear_qta8a_qga4w", "edgepass.linear_qga4w"

forms = st.builds(
    Form,
    dialect=st.sampled_from(["torchao", "decomposed"]),
    spelling=st.sampled_from(["linear", "mm", "addmm", "matmul", "bmm"]),
    rows=st.integers(1, 9),
    columns=st.sampled_from([4, 12, 24]),
    group=st.sampled_from([2, 4]),
    asymmetric=st.booleans(),
    bias=st.booleans(),
    dynamic=st.booleans(),
)


def fuse(module, x):
    return run_passes(PASSES, export(module, (x,)), (x,))


def reference(module: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    rows = quantized_rows(x) if module.form.dynamic else x.double()
    out = rows @ module.float64_weight().t()
    takes_bias = module.form.bias and module.form.spelling not in ("matmul", "bmm")
    return out + module.bias.double() if takes_bias else out


@given(form=forms, batch=st.integers(1, 3), tokens=st.integers(1, 4), seed=st.integers(0, 50))
def test_every_form_becomes_one_operator(form, batch, tokens, seed) -> None:
    torch.manual_seed(seed)
    module, x = QuantizedLinear(form, seed), torch.randn(batch, tokens, form.columns)
    program, _ = fuse(module, x)
    assert count(program, HUB if form.dynamic else WEIGHT_ONLY) == 1
    assert count(program, "edgepass.quantize_per_token") == form.dynamic
    assert not find(program, "torchao.dequantize_affine", "aten.linear", "aten.mm", "aten.view")
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0


@given(form=forms)
def test_a_second_run_changes_nothing(form) -> None:
    x = torch.randn(1, 3, form.columns)
    program, _ = fuse(QuantizedLinear(form), x)
    before = str(program.graph)
    _, log = fuse(program.to_exported().module(), x)
    assert log.counts["dynamically-quantized-linear"].applied == 0
    assert str(program.graph) == before


@given(form=forms, tokens=st.integers(2, 6))
def test_a_dynamic_number_of_tokens_stays_dynamic(form, tokens) -> None:
    module, size = QuantizedLinear(form), torch.export.Dim("tokens", min=2, max=32)
    x = torch.randn(2, 7, form.columns)
    exported = export(module, (x,), ({1: size},))
    program, _ = run_passes(PASSES, exported, (x,))
    other = torch.randn(2, tokens, form.columns)
    result = program.to_exported().module()(other)
    assert sqnr_db(reference(module, other), result) >= 110.0


@pytest.mark.parametrize("shape", [(32,), (5, 32), (1, 5, 32), (2, 1, 3, 32)])
def test_inputs_of_any_rank(shape) -> None:
    module, x = QuantizedLinear(Form(bias=True)), torch.randn(shape)
    program, _ = fuse(module, x)
    assert count(program, HUB) == 1
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models(dtype) -> None:
    module, x = QuantizedLinear(Form(dtype=dtype)), torch.randn(3, 32).to(dtype)
    program, _ = fuse(module, x)
    assert find(program, HUB)[0].meta["val"].dtype == dtype


def test_a_view_of_the_activation_s_bits_is_refused() -> None:
    class Bits(QuantizedLinear):
        def forward(self, x):
            return torch.mm(x.view(torch.bfloat16), self.dequantized().t())

    module = Bits(Form(dynamic=False, dtype=torch.bfloat16))
    program, log = fuse(module, torch.randn(3, 32).half())
    assert not find(program, WEIGHT_ONLY)
    assert "view is torch.bfloat16, x torch.float16" in reasons(log, "weight-only-linear")


def test_per_channel_weights_are_one_group() -> None:
    for dialect in ("torchao", "decomposed"):
        program, _ = fuse(QuantizedLinear(Form(dialect=dialect, group=32)), torch.randn(3, 32))
        assert find(program, HUB)[0].args[4] == 32


@pytest.mark.parametrize("low", [-8, 0])
@pytest.mark.parametrize("dynamic", [True, False])
def test_zero_points_that_are_no_integers(low: int, dynamic: bool) -> None:
    form = Form(low=low, high=low + 15, asymmetric=True, fraction=0.37, dynamic=dynamic)
    module, x = QuantizedLinear(form), torch.randn(3, 32)
    program, _ = fuse(module, x)
    assert count(program, HUB if dynamic else WEIGHT_ONLY) == 1
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0


def test_float_zero_points_that_are_whole_are_stored_as_integers() -> None:
    program, _ = fuse(QuantizedLinear(Form(asymmetric=True, fraction=1.0)), torch.randn(3, 32))
    zeros = program.constant(find(program, HUB)[0].args[6])
    assert zeros is not None and zeros.dtype == torch.int8


def test_zero_points_that_are_not_finite_are_refused() -> None:
    program, _ = fuse(QuantizedLinear(Form(fraction=torch.inf)), torch.randn(3, 32))
    (row,) = explain_linears(program)
    assert not row.fused and "not finite" in row.reason


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_zero_points_of_wide_unsigned_dtypes(dtype: torch.dtype) -> None:
    module, x = QuantizedLinear(Form(low=0, high=15, asymmetric=True)), torch.randn(3, 32)
    wanted = reference(module, x)
    module.zeros = module.zeros.to(dtype)
    program, _ = fuse(module, x)
    assert count(program, HUB) == 1
    assert sqnr_db(wanted, program.to_exported().module()(x)) >= 110.0
    module.zeros = torch.full_like(module.zeros, 300)
    program, _ = fuse(module, x)
    (row,) = explain_linears(program)
    assert not row.fused and "are no int8 (300..300)" in row.reason


def test_unsigned_values_are_shifted_with_their_zero_points() -> None:
    form = Form(low=0, high=15, asymmetric=True)
    module, x = QuantizedLinear(form), torch.randn(3, 32)
    program, _ = fuse(module, x)
    assert count(program, HUB) == 1
    assert sqnr_db(reference(module, x), program.to_exported().module()(x)) >= 110.0


class Attention(nn.Module):
    """Three linears of one activation, and a fourth of another."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (QuantizedLinear(form, seed) for seed in range(4))

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) * self.v(x))


@pytest.mark.parametrize("dialect", ["torchao", "decomposed"])
def test_linears_of_one_activation_share_its_quantization(dialect) -> None:
    form = Form(dialect=dialect, rows=32)
    program, _ = fuse(Attention(form), torch.randn(2, 32))
    assert (count(program, HUB), count(program, "edgepass.quantize_per_token")) == (4, 2)


class Twice(nn.Module):
    """One weight in two linears, another equal to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.equal = (QuantizedLinear(Form(rows=32)) for _ in range(2))

    def forward(self, x):
        return self.equal(self.one(self.one(x)))


def test_a_tied_weight_is_packed_once() -> None:
    program, _ = fuse(Twice(), torch.randn(2, 32))
    assert len({node.args[3] for node in find(program, HUB)}) == 1
    packed = [n for n in program.placeholders if str(program.qualified_name(n)).endswith("int4")]
    assert len(packed) == 1


class Mixed(nn.Module):
    """A fused linear, a float one, one of 8 bits, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = QuantizedLinear(Form(rows=32))
        self.plain = nn.Linear(32, 32)
        self.wide = QuantizedLinear(Form(rows=32, low=-128, high=127))

    def forward(self, x):
        h = self.wide(self.plain(self.fused(x)))
        return h @ h.t()


def test_every_linear_has_a_row() -> None:
    exported = export(Mixed(), (torch.randn(2, 32),))
    program, _ = run_passes(PASSES, exported, (torch.randn(2, 32),))
    rows = {row.name: row for row in explain_linears(program)}
    assert list(rows) == ["fused", "plain", "wide"]
    assert rows["fused"].fused and rows["fused"].reason is None
    assert rows["plain"].reason.startswith("expected torchao.dequantize_affine or")
    assert rows["plain"].reason.endswith("found placeholder p_plain_weight")
    assert rows["wide"].reason == "the weight b_wide_values has values -128..127, beyond 4 bits"
    assert rows["wide"].node == "b_wide_values"


def test_a_model_that_torchao_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 16, bias=False))
    config = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(16))
    quantize_(model, config)
    x = torch.randn(5, 64)
    program, _ = fuse(model, x)
    assert all(row.fused for row in explain_linears(program))
    assert [row.name for row in explain_linears(program.to_exported())] == ["0", "2"]


def test_a_graph_without_a_match_comes_back_untouched() -> None:
    exported = export(nn.Linear(8, 8), (torch.randn(2, 8),))
    program, log = run_passes([FuseQuantizedLinear()], exported, (torch.randn(2, 8),))
    assert not log.changed
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]
