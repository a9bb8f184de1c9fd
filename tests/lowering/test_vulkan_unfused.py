"""Quantization that no rule fused: the same bits in plain aten, constants computed once."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torchao.quantization.quant_primitives
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepass.lowering import vulkan_unfused as plain
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_plain import is_outside
from edgepass.lowering.vulkan_unfused import rewrite_unfused
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import operator_name
from tests.lowering.vulkan_programs import EagerRun, export_tokens

decomposed, torchao = torch.ops.quantized_decomposed, torch.ops.torchao
INT8 = (-128, 127, torch.int8)


def rows(seed: int, exponent: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 12, generator=generator) * 10.0**exponent


@given(seed=st.integers(0, 99), exponent=st.integers(-8, 6))
@settings(max_examples=20)
def test_per_tensor_forms_have_the_same_bits(seed: int, exponent: int) -> None:
    x = rows(seed, exponent)
    scale, zero = decomposed.choose_qparams.tensor(x, -128, 127, 1e-5, torch.int8)
    own = plain.choose_per_tensor(x, -128, 127, 1e-5, torch.int8)
    assert torch.equal(own[0], scale)
    assert torch.equal(own[1], zero)
    q = decomposed.quantize_per_tensor.tensor(x, scale, zero, *INT8)
    assert torch.equal(plain.quantize_per_tensor(x, scale, zero, *INT8), q)
    back = decomposed.dequantize_per_tensor.tensor(q, scale, zero, *INT8)
    assert torch.equal(plain.dequantize_per_tensor(q, scale, zero, *INT8), back)
    fixed = decomposed.quantize_per_tensor.default(x, 0.05, 3, *INT8)
    assert torch.equal(plain.quantize_per_tensor(x, 0.05, 3, *INT8), fixed)


@given(seed=st.integers(0, 99), exponent=st.integers(-8, 6))
@settings(max_examples=20)
def test_per_token_forms_have_the_same_bits(seed: int, exponent: int) -> None:
    x = rows(seed, exponent)
    encoding = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    assert all(map(torch.equal, plain.choose_per_token(x, torch.int8), encoding))
    q = decomposed.quantize_per_token(x, *encoding, *INT8)
    assert torch.equal(plain.quantize_per_token(x, *encoding, *INT8), q)
    back = decomposed.dequantize_per_token(q, *encoding, *INT8, torch.float32)
    assert torch.equal(plain.dequantize_per_token(q, *encoding, *INT8, torch.float32), back)


def test_a_product_of_integers_is_exact() -> None:
    left = torch.randint(-128, 128, (32, 4096), dtype=torch.int8)
    right = torch.randint(-128, 128, (4096, 24), dtype=torch.int8)
    assert torch.equal(plain.int_mm(left, right), torch._int_mm(left, right))


class Unfused(nn.Module):
    """An int8 weight, and an activation quantized per token, around a float linear."""

    def __init__(self, dialect: str):
        super().__init__()
        self.dialect = dialect
        self.register_buffer("values", torch.randint(-128, 128, (8, 12), dtype=torch.int8))
        shape = (8, 1) if dialect == "torchao" else (8,)
        self.register_buffer("scales", torch.rand(shape) + 0.5)
        self.register_buffer("zeros", torch.zeros(shape, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.dialect == "torchao":
            block = [1] * (x.dim() - 1) + [12]
            encoding = torchao.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, -128, 127)
            q = torchao.quantize_affine(x, block, *encoding, torch.int8, -128, 127)
            x = torchao.dequantize_affine(q, block, *encoding, torch.int8, -128, 127)
            weight = torchao.dequantize_affine(
                self.values, [1, 12], self.scales, self.zeros, torch.int8, -128, 127
            )
        else:
            encoding = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
            q = decomposed.quantize_per_token(x, *encoding, *INT8)
            x = decomposed.dequantize_per_token(q, *encoding, *INT8, torch.float32)
            weight = decomposed.dequantize_per_channel(
                self.values, self.scales, self.zeros, 0, *INT8
            )
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("dialect", ["torchao", "decomposed"])
def test_neither_dialect_is_left(dialect: str) -> None:
    module = Unfused(dialect)
    program = export_tokens(module, 12)
    working = WorkingProgram(program)
    rewrite_unfused(GraphEditor(working))
    calls = [node for node in working.graph.nodes if node.op == "call_function"]
    assert {operator_name(node.target).partition(".")[0] for node in calls} == {"aten"}
    (linear,) = [node for node in calls if operator_name(node.target) == "aten.linear"]
    assert working.is_constant(linear.args[1])
    assert not is_outside(linear)
    assert all(is_outside(node) for node in calls if node is not linear)
    x = rows(0, 0)[:1]
    assert torch.equal(EagerRun(working.to_exported())(x), module(x))


def test_equal_constants_are_computed_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Unfused("decomposed")

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.one(-x)

    working = WorkingProgram(export_tokens(Two(), 12))
    rewrite_unfused(GraphEditor(working))
    linears = working.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert linears[0].args[1] is linears[1].args[1]
    assert working.is_constant(linears[0].args[1])
