"""Random small blocks of quantized linears, lowered for Vulkan and run with its arithmetic.

The reference is float64 from the integers of the weights and of the rounded activations. The
runtime reads the activation of one token as floats, and so does the reference then.
"""

import math
import os
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

import edgepass
from edgepass.lowering.vulkan_operators import has_operator
from edgepass.ops.errors import EdgepassError
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_files import delegates
from tests.passes.quantized_programs import Form, QuantizedLinear, quantized_rows

_MOST = 64
# What one sum may lose, as a share of the sum of its terms' sizes: by the dtype of the program.
_LOSS = {torch.float32: 1e-5, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Block:
    """Linears of one activation; ``views`` folds the result of each, ``twice`` calls each twice."""

    forms: tuple[Form, ...]
    lead: tuple[int, ...] = (1,)
    counts: tuple[int, ...] = (5, 2)
    views: bool = False
    twice: bool = False
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def k(self) -> int:
        return self.forms[0].columns


class BlockModule(nn.Module):
    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        self.linears = nn.ModuleList(QuantizedLinear(form, i) for i, form in enumerate(block.forms))

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for linear in self.linears:
            for y in (x, -x) if self.block.twice else (x,):
                y = linear(y)
                results.append(self.folded(y) if self.block.views else y)
        return results

    def folded(self, y: Tensor) -> Tensor:
        """The user's own view and transpose behind a linear."""
        n = y.shape[-1]
        parts = next(p for p in (4, 3, 2, 1) if n % p == 0)
        return y.view(*y.shape[:-1], parts, n // parts).transpose(-1, -2)


@st.composite
def forms(draw: st.DrawFn, group: int, columns: int, dtype: torch.dtype) -> Form:
    # PT2E's weight by channels gives float32 whatever the model is.
    dialects = ["torchao"] if dtype != torch.float32 else ["torchao", "decomposed"]
    low, high = draw(st.sampled_from([(-8, 7), (-7, 7), (0, 15)]))
    return Form(
        dialect=draw(st.sampled_from(dialects)),
        rows=draw(st.one_of(st.integers(1, 24), st.integers(1, 300))),
        columns=columns,
        group=group,
        asymmetric=draw(st.booleans()),
        bias=draw(st.booleans()),
        dynamic=draw(st.booleans()),
        low=low,
        high=high,
        dtype=dtype,
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    group = draw(st.one_of(st.integers(1, 64), st.sampled_from([96, 100, 128, 256]), st.just(300)))
    columns = group * draw(st.integers(1, max(1, 300 // group)))
    kinds = [torch.float32] * 3 + [torch.float16, torch.bfloat16]
    dtype = draw(st.sampled_from(kinds))
    return Block(
        tuple(draw(st.lists(forms(group, columns, dtype), min_size=1, max_size=2))),
        lead=draw(st.sampled_from([(), (1,), (2,), (1, 1), (2, 2)])),
        counts=tuple(draw(st.lists(st.integers(1, _MOST), min_size=2, max_size=3))),
        views=draw(st.booleans()),
        twice=draw(st.booleans()),
        dtype=dtype,
    )


def rows(block: Block, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(*block.lead, count, block.k, generator=generator)
    return x.to(block.dtype)


def check(block: Block) -> None:
    """Lower a block once and run it with each token count."""
    module = BlockModule(block).eval()
    dynamic = ({len(block.lead): Dim("tokens", min=1, max=_MOST)},)
    with torch.no_grad():
        program = export(module, (rows(block, 7),), dynamic_shapes=dynamic)
    buffer = edgepass.lower(program, backend="vulkan").buffer
    found = delegates(buffer)
    assert all(has_operator(name) for each in found for name in each.operators)
    simulated = SimulatedProgram(buffer)
    for count in block.counts:
        x = rows(block, count)
        got = iter(simulated.run([x]))
        for linear in module.linears:
            for each in (x, -x) if block.twice else (x,):
                check_result(module, linear, each, next(got))


def check_result(module: BlockModule, linear: QuantizedLinear, x: Tensor, got: Tensor) -> None:
    """Compare with float64 within what rounding may change, value by value."""
    block, form = module.block, linear.form
    one_token = math.prod(x.shape[:-1]) == 1
    weight = linear.float64_weight()
    seen = quantized_rows(x.float()) if form.dynamic and not one_token else x.double()
    wanted = seen @ weight.t()
    sizes = seen.abs() @ magnitude(linear).t()
    if form.bias:
        wanted, sizes = wanted + linear.bias.double(), sizes + linear.bias.double().abs()
    allowed = _LOSS[block.dtype] * sizes
    if form.dynamic and not one_token:
        allowed = allowed + flips(x, weight, block.dtype)
    if block.views:
        wanted, allowed = module.folded(wanted), module.folded(allowed)
    assert got.shape == wanted.shape
    assert got.dtype == block.dtype
    assert ((got.double() - wanted).abs() <= allowed).all(), (got.double() - wanted).abs().max()


def magnitude(linear: QuantizedLinear) -> Tensor:
    """How large the terms of a sum are before the zero points' share is taken off."""
    groups = linear.values.double().unflatten(1, (-1, linear.form.group)).abs() + 8
    sizes = groups + linear.zeros.double().unsqueeze(-1).abs()
    return (sizes * linear.scales.double().unsqueeze(-1)).flatten(1)


def flips(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What activations that round the other way may change, ``[.., N]``: two of each row.

    In half precision the scale itself is rounded, and any of them may.
    """
    high, low = x.amax(-1).clamp(min=0).double(), x.amin(-1).clamp(max=0).double()
    step = ((high - low) / 255).unsqueeze(-1)
    if dtype == torch.float16:
        return step * weight.abs().sum(1)
    return 2.01 * step * weight.abs().amax(1)


@given(blocks())
@settings(max_examples=100 if os.environ.get("CI") else 6)
def test_any_block(block: Block) -> None:
    check(block)


@pytest.mark.nightly
@given(blocks())
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
