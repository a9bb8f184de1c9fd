"""Delegates written without re-tracing equal those that stock writes from the same program."""

import pytest
import torch
from executorch.backends.vulkan.vulkan_preprocess import VulkanBackend
from executorch.exir import EdgeProgramManager, to_edge
from executorch.exir.backend.backend_details import PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data, tag_mutated_buffer
from torch import nn
from torch.export import ExportedProgram

from edgepass.lowering.edge_forms import edge_config
from edgepass.lowering.vulkan_backend import EdgepassVulkanBackend, is_final
from edgepass.lowering.vulkan_edge import to_edge_directly
from edgepass.lowering.vulkan_rewrite import rewrite_for_vulkan
from tests.lowering.vulkan_files import Delegate, read_graph
from tests.lowering.vulkan_programs import Decoder, Mlp, export_decoder, export_tokens

HALF = [CompileSpec("force_fp16", b"\x01")]


class TakeAll(Partitioner):
    def __init__(self, backend: str, specs: list[CompileSpec]):
        super().__init__()
        self.delegation = DelegationSpec(backend, specs)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        for node in exported_program.graph.nodes:
            if node.op == "call_function":
                node.meta["delegation_tag"] = "all"
        tag_constant_data(exported_program)
        tag_mutated_buffer(exported_program)
        return PartitionResult(exported_program, {"all": self.delegation})


def ours(program: ExportedProgram, specs: list[CompileSpec]) -> Delegate:
    rewritten = rewrite_for_vulkan(program, merge=True, half=bool(specs))
    edge = EdgeProgramManager(to_edge_directly(rewritten.program), compile_config=edge_config())
    return delegate(edge, EdgepassVulkanBackend.__name__, specs)


def stocks(program: ExportedProgram, specs: list[CompileSpec]) -> Delegate:
    rewritten = rewrite_for_vulkan(program, merge=True, half=bool(specs))
    edge = to_edge(rewritten.program, compile_config=edge_config())
    return delegate(edge, VulkanBackend.__name__, specs)


def delegate(edge: EdgeProgramManager, backend: str, specs: list[CompileSpec]) -> Delegate:
    lowered = edge.to_backend(TakeAll(backend, specs)).exported_program().graph_module
    module = lowered.lowered_module_0
    return Delegate(backend, read_graph(module.processed_bytes), {})


@pytest.mark.parametrize("specs", [[], HALF], ids=["fp32", "fp16"])
def test_a_decoder_is_written_as_stock_writes_it(specs: list[CompileSpec]) -> None:
    program = export_decoder(Decoder(layers=2))
    assert ours(program, specs).canonical() == stocks(program, specs).canonical()


@pytest.mark.parametrize("specs", [[], HALF], ids=["fp32", "fp16"])
def test_a_perceptron_is_written_as_stock_writes_it(specs: list[CompileSpec]) -> None:
    program = export_tokens(Mlp(), 64)
    assert ours(program, specs).canonical() == stocks(program, specs).canonical()


class Mixture(nn.Module):
    """Each of the plain operators that have a direct form, but for ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sigmoid(x) + torch.tanh(x) * torch.relu(x) - nn.functional.silu(x) / 3.0
        h = nn.functional.gelu(h, approximate="tanh")
        h = h.view(1, -1, 4, 4).transpose(2, 3).permute(0, 1, 3, 2).reshape(1, -1, 16)
        h = torch.cat([h[..., :8], h[..., 8:]], dim=-1)
        return h[:, -1:]


def test_plain_operators_are_written_as_stock_writes_them() -> None:
    program = export_tokens(Mixture(), 16)
    assert ours(program, []).canonical() == stocks(program, []).canonical()


def test_a_float_linear_is_one_operator() -> None:
    """Stock comes to the same by way of views, a transpose and a product."""
    written = ours(export_tokens(nn.Sequential(nn.Linear(16, 24)), 16), [])
    ((x, weight, bias, y),) = written.arguments("aten.linear.default")
    assert written.operators == ["aten.linear.default"]
    assert (x.dims, weight.dims, bias.dims) == ([1, 31, 16], [24, 16], [24])
    assert y.dims == [1, 31, 24]


def test_layouts_go_by_the_largest_sizes() -> None:
    """4,095 slices do not fit an image, though the example's 7 do."""
    program = export_decoder(Decoder(context=4096))
    graph = ours(program, [])
    for query, *_ in graph.arguments("sdpa_with_kv_cache.default"):
        assert query.dims == [1, 4095, 4, 16]
        assert query.storage_type.name == "BUFFER"


def test_other_operators_are_left_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    program = to_edge(export_tokens(nn.Softmax(dim=-1), 16)).exported_program()
    result = PreprocessResult(b"by stock")
    monkeypatch.setattr(VulkanBackend, "preprocess", lambda *arguments: result)
    assert not is_final(program)
    assert EdgepassVulkanBackend.preprocess(program, []) is result


def test_a_weight_that_is_a_view_is_written_alone() -> None:
    module = Mlp()
    module.first.packed = torch.cat([module.first.packed] * 2)[:96]
    lowered = ours(export_tokens(module, 64), [])
    sizes = {constant.length for constant in lowered.graph.constants}
    assert max(sizes) == 96 * 32
