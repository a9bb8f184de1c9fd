"""What lies outside the delegates: kernels, buffers and sizes, against the runtime itself."""

from typing import Any

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, export

from edgepass.lowering.vulkan import lower_vulkan
from edgepass.ops.errors import ProgramError, SimulatorError
from edgepass.simulator.method import Method
from edgepass.simulator.portable import PortableKernel
from edgepass.simulator.pte import ProgramFile
from tests.lowering.vulkan_programs import Mlp, export_tokens


class Mixed(nn.Module):
    """Views, reductions, lists, indices, constants and a number taken from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(40.0).view(10, 4))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        rows = self.table[ids]
        left, right = torch.split(x, 2, dim=-1)
        y = torch.cat((left.exp(), right * 2.0), -1) + rows
        mask = torch.arange(y.shape[0])[:, None] <= ids[:, None]
        masked = torch.where(mask, y, torch.full((), -1.0))
        return masked.softmax(-1), y.reshape(-1).amax(0), masked.transpose(0, 1).sum(0)


class OfRows(nn.Module):
    """As many rows as are given: views with a computed size, and a count of them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.shape[0]
        y = x.reshape(rows * 2, 2).exp()
        return y.softmax(-1), torch.cat((x, x * 2.0)).sum(0) + rows


class Counting(nn.Module):
    """Two buffers: one that begins as zeros, one with a content of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("total", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x)
        self.total.mul_(2.0)
        return self.seen + self.total


def portable(module: nn.Module, inputs: tuple[Any, ...], dynamic: Any = None) -> bytes:
    program = to_edge(export(module, inputs, dynamic_shapes=dynamic))
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    return bytes(program.to_executorch(config).buffer)


def on_the_runtime(buffer: bytes, *calls: tuple[Any, ...]) -> list[list[Tensor]]:
    program = Runtime.get().load_program(buffer)
    method = program.load_method("forward")
    return [[each.clone() for each in method.execute(list(inputs))] for inputs in calls]


def test_kernels_give_what_the_runtime_gives() -> None:
    example = torch.randn(6, 4), torch.tensor([0, 3, 9, 1, 5, 2])
    buffer = portable(Mixed(), example)
    (expected,) = on_the_runtime(buffer, example)
    found = Method(ProgramFile(buffer), "forward").run(example)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_sizes_change_from_call_to_call() -> None:
    dynamic = ({0: Dim("rows", min=1, max=9)},)
    buffer = portable(OfRows(), (torch.randn(6, 4),), dynamic)
    method = Method(ProgramFile(buffer), "forward")
    calls = [(torch.randn(n, 4),) for n in (6, 9, 1, 4)]
    for inputs, expected in zip(calls, on_the_runtime(buffer, *calls), strict=True):
        for one, other in zip(method.run(inputs), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_buffers_persist_until_reset() -> None:
    program = to_edge(export(Counting(), (torch.ones(4),)))
    config = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(["total"])])
    buffer = bytes(program.to_executorch(config).buffer)
    method = Method(ProgramFile(buffer), "forward")
    x = torch.ones(4)
    first = method.run([x])[0]
    assert torch.equal(first, 1 + 2 * torch.arange(4.0))
    assert torch.equal(method.run([x])[0], 2 + 4 * torch.arange(4.0))
    assert torch.equal(first, 1 + 2 * torch.arange(4.0))
    method.reset()
    assert torch.equal(method.run([x])[0], first)


@pytest.mark.parametrize("name", ["aten::from_file.out", "aten::none.out", "other::add.out", ""])
def test_operators_that_no_portable_kernel_computes_are_named(name: str) -> None:
    with pytest.raises(SimulatorError, match=f"unknown operator: got {name} outside"):
        PortableKernel(name)


def test_each_known_kernel_is_an_operator_of_torch() -> None:
    from edgepass.simulator.portable import _KNOWN_ATEN

    for name in _KNOWN_ATEN:
        PortableKernel(f"aten::{name.removesuffix('.default')}")


def test_a_foreign_delegate_is_named() -> None:
    buffer = lower_vulkan(export_tokens(Mlp(), 64)).buffer
    file = ProgramFile(buffer.replace(b"VulkanBackend", b"MulkanBackend"))
    with pytest.raises(SimulatorError, match="delegate=MulkanBackend, accepted is VulkanBackend"):
        Method(file, "forward")


def test_an_instruction_outside_the_table_is_damage() -> None:
    buffer = portable(Counting(), (torch.ones(4),))
    file = ProgramFile(buffer)
    record = file.plans["forward"]
    record.chains[0].instructions[0].instr_args.op_index = 99
    with pytest.raises(ProgramError, match="an instruction with op_index=99"):
        Method(file, "forward")
