"""Linears of any form in the runtime's legal form: the same numbers, and nothing outside."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from edgepass.lowering.vulkan_rewrite import Rewritten, rewrite_for_vulkan
from edgepass.passes.targets import is_call
from tests.lowering.vulkan_programs import (
    EagerRun,
    QuantizedLinear,
    export_tokens,
    fused,
    sqnr_db,
)

# What the runtime computes right, apart from the table that the lowering reads.
_GROUPS_WITH_QUANTIZED_ACTIVATIONS = {*range(4, 65, 4), 128}


@dataclass(frozen=True)
class Case:
    """Linears of one activation ``[*lead, tokens, groups * group]``."""

    groups: int = 2
    group: int = 32
    outputs: tuple[int, ...] = (8,)
    lead: tuple[int, ...] = (1,)
    bias: bool = False
    asymmetric: bool = False
    fraction: float = 0.0
    quantized: bool = True

    @property
    def k(self) -> int:
        return self.groups * self.group


class Linears(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.linears = nn.ModuleList(
            QuantizedLinear(case.k, n, case.group, case.bias, seed=i)
            for i, n in enumerate(case.outputs)
        )
        for linear in self.linears if case.asymmetric else ():
            zeros = torch.randint(-8, 8, linear.zeros.shape, dtype=torch.int8)
            linear.zeros = zeros + case.fraction if case.fraction else zeros

    def forward(self, x: Tensor) -> Tensor:
        if not self.case.quantized:
            return torch.cat([linear.of_float(x) for linear in self.linears], dim=-1)
        quantized = fused.quantize_per_token(x)
        return torch.cat([linear(quantized) for linear in self.linears], dim=-1)


def assert_legal(rewritten: Rewritten) -> None:
    """Check each linear of the program against the runtime's limits, written down once more."""
    assert rewritten.declined == ()
    assert rewritten.whole
    for node in rewritten.program.graph.nodes:
        if is_call(node, "et_vk.linear_dq8ca_q4gsw", "et_vk.linear_q4gsw"):
            x = node.args[0].meta["val"]
            quantized = is_call(node, "et_vk.linear_dq8ca_q4gsw")
            group = node.args[6 if quantized else 3]
            assert x.dim() in (2, 3)
            assert all(size == 1 for size in x.shape[:-2])
            assert x.shape[-1] % (4 if quantized else 8) == 0
            assert node.meta["val"].shape[-1] % 8 == 0
            assert x.shape[-1] % group == 0
            assert group % 4 == 0
            if quantized:
                assert group in _GROUPS_WITH_QUANTIZED_ACTIVATIONS


def agreement(case: Case, tokens: int = 6, scale: float = 1.0) -> float:
    """Lower a case, check that it is legal, and compare it with the fused program in dB."""
    program = export_tokens(Linears(case), case.k, case.lead)
    rewritten = rewrite_for_vulkan(program, merge=True, half=False)
    assert_legal(rewritten)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(*case.lead, tokens, case.k, generator=generator) * scale
    got, wanted = EagerRun(rewritten)(x), EagerRun(program)(x)
    assert got.shape == wanted.shape
    return sqnr_db(got, wanted)


@pytest.mark.parametrize("group", [96, 100, 256, 512, 50, 2, 1, 7, 268, 300])
def test_groups_of_any_size(group: int) -> None:
    for groups, quantized in ((1, True), (3, True), (1, False), (3, False)):
        assert agreement(Case(groups, group, quantized=quantized)) > 110


@pytest.mark.parametrize("outputs", [(12,), (1,), (4, 20), (7, 8, 9)])
def test_outputs_of_any_number(outputs: tuple[int, ...]) -> None:
    assert agreement(Case(outputs=outputs, bias=True)) > 110
    assert agreement(Case(outputs=outputs, quantized=False)) > 110


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (1, 1)])
def test_batches_of_any_rank(lead: tuple[int, ...]) -> None:
    for quantized in (True, False):
        assert agreement(Case(lead=lead, quantized=quantized)) > 110


@pytest.mark.parametrize("case", [Case(), Case(bias=True), Case(4, 100), Case(3, 7, (5, 6))])
@pytest.mark.parametrize("fraction", [0.0, 0.37])
def test_asymmetric_weights(case: Case, fraction: float) -> None:
    for quantized in (True, False):
        changes = {"asymmetric": True, "fraction": fraction, "quantized": quantized}
        assert agreement(Case(**{**vars(case), **changes})) > 110


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1.0, 1e6, 1e25])
def test_activations_of_any_size(scale: float) -> None:
    assert agreement(Case(outputs=(16,)), scale=scale) > 110
    assert agreement(Case(asymmetric=True), scale=scale) > 110


@given(
    case=st.builds(
        Case,
        groups=st.integers(1, 4),
        group=st.integers(1, 75),
        outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
        lead=st.sampled_from([(), (1,), (2,), (2, 2)]),
        bias=st.booleans(),
        asymmetric=st.booleans(),
        fraction=st.sampled_from([0.0, 0.37]),
        quantized=st.booleans(),
    ),
    tokens=st.integers(1, 9),
)
@settings(max_examples=20)
def test_any_linear(case: Case, tokens: int) -> None:
    assert agreement(case, tokens) > 100


def test_two_dynamic_sizes_are_declined_with_the_reason() -> None:
    linears = Linears(Case(lead=(2,))).eval()
    sizes = {0: Dim("batch", min=2, max=8), 1: Dim("tokens", min=2, max=31)}
    with torch.no_grad():
        program = export(linears, (torch.randn(3, 5, 64),), dynamic_shapes=(sizes,))
    (declined,) = rewrite_for_vulkan(program, merge=True, half=False).declined
    assert declined.reason.endswith("with 2 dynamic sizes: a view infers one")
