"""RMSNorm in every spelling becomes one operator; each near miss says why it stays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.rms_norm import FuseRmsNorm
from tests.passes.programs import count, export, find, reasons, run_passes, sqnr_db

PASSES = [Canonicalize(), FuseRmsNorm()]


def llama(x, weight, eps):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemma(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def olmo(x, weight, eps):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(eps + (wide * wide).mean(-1, keepdim=True))
    return (weight * wide).to(x.dtype)


def divided(x, weight, eps):
    wide = x.float()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def reciprocal(x, weight, eps):
    wide = x.float()
    root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * root.reciprocal()).to(x.dtype) * weight


def builtin(x, weight, eps):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


SPELLINGS = [llama, gemma, olmo, divided, reciprocal, builtin]
DTYPES = {torch.float32: 120.0, torch.float16: 60.0, torch.bfloat16: 42.0}


def float64_reference(spelling, x, weight, eps):
    unit = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return unit * (weight.double() + (1 if spelling is gemma else 0))


def fuse(function, x, weight):
    return run_passes(PASSES, export(function, (x,), weight=weight), (x,))


@given(
    spelling=st.sampled_from(SPELLINGS),
    dtype=st.sampled_from(list(DTYPES)),
    shape=st.lists(st.integers(1, 5), max_size=3),
    size=st.integers(1, 33),
    eps=st.floats(1e-8, 1e-2),
    seed=st.integers(0, 99),
)
def test_every_spelling_becomes_one_operator(spelling, dtype, shape, size, eps, seed) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*shape, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    program, _ = fuse(lambda x, weight: spelling(x, weight, eps), x, weight)
    assert count(program, "edgepass.rms_norm") == 1
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1
    result = program.to_exported().module()(x)
    assert result.dtype == dtype
    assert sqnr_db(float64_reference(spelling, x, weight, eps), result) >= DTYPES[dtype]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_second_run_changes_nothing(spelling) -> None:
    x = torch.randn(2, 8)
    program, _ = fuse(lambda x, weight: spelling(x, weight, 1e-6), x, torch.randn(8))
    _, log = run_passes([FuseRmsNorm()], program.to_exported(), (x,))
    assert not log.changed


def test_norms_of_queries_over_the_head_dimension() -> None:
    x = torch.randn(1, 5, 24)
    program, _ = run_passes(
        PASSES,
        export(
            lambda x, weight: llama(x.view(1, 5, 3, 8), weight, 1e-6).transpose(1, 2),
            (x,),
            weight=torch.randn(8),
        ),
        (x,),
    )
    assert find(program, "edgepass.rms_norm")[0].meta["val"].shape == (1, 5, 3, 8)


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return gemma(gemma(x, self.weight, 1e-6), self.weight, 1e-6)


def test_one_plus_weight_is_folded_once_for_a_shared_weight() -> None:
    x = torch.randn(2, 8)
    program, _ = run_passes(PASSES, export(TwoNorms(), (x,)), (x,))
    assert count(program, "edgepass.rms_norm") == 2
    names = [program.qualified_name(n) for n in program.placeholders if program.is_constant(n)]
    assert names == ["weight_plus_one"]


def test_the_parts_that_others_read_are_kept() -> None:
    def forward(x, weight):
        wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide, wide

    program, _ = fuse(forward, torch.randn(2, 8), torch.randn(8))
    assert (count(program, "edgepass.rms_norm"), count(program, "aten.rsqrt")) == (1, 1)


def test_builtin_without_weight_has_ones() -> None:
    x = torch.randn(2, 8)
    program, _ = run_passes(PASSES, export(lambda x: builtin(x, None, None), (x,)), (x,))
    assert count(program, "edgepass.rms_norm") == 1


NEAR_MISSES = {
    "the mean is over another dimension": (
        lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        "expected dimension -1 as `dim` of mean (aten.mean), found [0]",
    ),
    "another power": (
        lambda x, weight: weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
        "expected 2 as `exponent` of pow_1 (aten.pow), found 4",
    ),
    "another value is normalized": (
        lambda x, weight: weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "the same value as `x`",
    ),
    "no root": (
        lambda x, weight: weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "expected aten.rsqrt or aten.reciprocal as `other` of mul (aten.mul), found add (aten.add)",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_pattern_that_fails_says_where(name) -> None:
    function, sentence = NEAR_MISSES[name]
    program, log = fuse(function, torch.randn(8, 8), torch.randn(8))
    assert count(program, "edgepass.rms_norm") == 0
    deepest = max(log.near_misses, key=lambda miss: miss.depth)
    assert sentence in deepest.reason


REFUSALS = {
    "the weight has a value for each row": (
        lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        torch.randn(8, 1),
        "the weight placeholder b_weight has shape [8, 1], expected [6] for the last dimension",
    ),
    "eps is computed": (
        lambda x, weight: (
            weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs().max()))
        ),
        torch.randn(6),
        "eps is max_1 (aten.max), not a number",
    ),
    "1 is added to a computed weight": (
        lambda x, weight: (
            (1.0 + weight.sin()) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        ),
        torch.randn(6),
        "1 is added to sin, which is no constant",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_its_sentence(name) -> None:
    function, weight, sentence = REFUSALS[name]
    program, log = fuse(function, torch.randn(8, 6), weight)
    assert count(program, "edgepass.rms_norm") == 0
    assert sentence in reasons(log, "composed-rms-norm")


def test_a_mean_in_16_bits_is_refused() -> None:
    def forward(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))

    _, log = fuse(forward, torch.randn(2, 8).half(), torch.randn(8).half())
    assert reasons(log, "composed-rms-norm") == [
        "the mean of squares is taken in torch.float16, expected float32"
    ]


def test_a_result_of_another_dtype_is_refused() -> None:
    def forward(x, weight):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3))

    _, log = fuse(forward, torch.randn(2, 8).half(), torch.randn(8))
    assert reasons(log, "composed-rms-norm") == [
        "it turns torch.float16 into torch.float32, expected the input's dtype"
    ]


def test_rounding_on_the_way_is_refused() -> None:
    def forward(x, weight):
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return weight * unit.half().float()

    _, log = fuse(forward, torch.randn(2, 8), torch.randn(8))
    assert log.counts["composed-rms-norm"].applied == 0


def test_builtin_over_two_dimensions_is_refused() -> None:
    x = torch.randn(2, 3, 4)
    _, log = run_passes(
        PASSES, export(lambda x: nn.functional.rms_norm(x, (3, 4), None, 1e-6), (x,)), (x,)
    )
    assert reasons(log, "aten-rms-norm") == ["it normalizes over [3, 4]"]


def test_builtin_without_eps_in_16_bits_is_refused() -> None:
    x = torch.randn(2, 4).half()
    _, log = run_passes(PASSES, export(lambda x: builtin(x, None, None), (x,)), (x,))
    assert reasons(log, "aten-rms-norm") == ["eps is not given, and its default in 16 bits varies"]
