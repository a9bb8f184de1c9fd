"""Stock pipelines with edgepass registered, and as they were once it is not."""

import threading

import executorch.kernels.quantized  # noqa: F401
import pytest
import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn

import edgepass
from edgepass.calibration.recipes import quantize_model
from edgepass.lowering import partitioner_hooks, registration
from edgepass.lowering.partitioner_hooks import Hook, HookSet, tags_are_acyclic
from edgepass.lowering.report import delegates, outside_delegates
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.ops.errors import ProgramError
from edgepass.passes.verification import signal_to_noise_db
from tests.models.tiny_models import tiny_model

PARTITIONERS = [XnnpackPartitioner, VulkanPartitioner]
METHODS = [(owner, name) for owner in PARTITIONERS for name in ("partition",)]


@pytest.fixture
def registered():
    edgepass.register()
    yield
    edgepass.unregister()


class Gated(nn.Module):
    """Two linears of one activation, as in a feed-forward block, and a norm spelt out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, 64, bias=False)
        self.weight = nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def quantized() -> nn.Module:
    module = Gated()
    return quantize_model(module, "8da4w", 32)


def exported(module: nn.Module):
    tokens = torch.export.Dim("tokens", min=1, max=32)
    example = (torch.randn(1, 7, 64),)
    return torch.export.export(module, example, dynamic_shapes=({1: tokens},), strict=False)


def lower(program, *partitioners, **options):
    return to_edge_transform_and_lower(program, partitioner=list(partitioners), **options)


def run(manager, *inputs):
    program = Runtime.get().load_program(manager.buffer)
    return program.load_method("forward").execute(list(inputs))[0].clone()


def with_bfloat16_scales(module: nn.Module) -> nn.Module:
    """XNNPACK keeps weight scales in bfloat16: give eager the same ones."""
    for name in ("gate", "up", "down"):
        weight = getattr(module, name).weight
        inner = (
            weight.original_weight_tensor if hasattr(weight, "original_weight_tensor") else weight
        )
        inner.scale.copy_(inner.scale.bfloat16().to(inner.scale.dtype))
    return module


@pytest.mark.parametrize(
    "partitioners",
    [
        [XnnpackPartitioner],
        [XnnpackDynamicallyQuantizedPartitioner, XnnpackPartitioner],
    ],
)
def test_stock_xnnpack_gets_the_fusions(registered, partitioners) -> None:
    module = with_bfloat16_scales(quantized())
    manager = lower(exported(module), *(each() for each in partitioners)).to_executorch()
    assert delegates(manager) == {"forward": 1}
    assert outside_delegates(manager) == {"forward": {}}
    for tokens in (5, 1, 32):
        x = torch.randn(1, tokens, 64)
        assert signal_to_noise_db(module(x), run(manager, x)) > 40


def test_stock_vulkan_gets_the_fusions(registered) -> None:
    edge = lower(exported(quantized()), VulkanPartitioner())
    manager = edge.to_executorch()
    assert delegates(manager) == {"forward": 1}
    assert outside_delegates(manager) == {"forward": {}}
    (delegate,) = edge.exported_program().graph_module.children()
    assert delegate.backend_id == "VulkanBackend"
    names = [str(node.target) for node in delegate.original_module.graph.nodes]
    assert sum("linear_dq8ca_q4gsw" in name for name in names) == 2  # gate and up are one


def test_a_whole_decoder_goes_through_stock(registered) -> None:
    model = tiny_model()
    decoder = StaticCacheDecoder(model, 24)
    edgepass.quantize_model(model, "8da4w", 32)
    program = export_decoder(decoder)
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    manager = lower(program, XnnpackPartitioner(), compile_config=config).to_executorch()
    assert delegates(manager) == {"forward": 4}
    inputs = torch.tensor([[5, 6, 7]]), torch.tensor([0])
    mine = run(edgepass.lower(program, backend="xnnpack"), *inputs)
    assert torch.equal(run(manager, *inputs), mine)


def test_a_program_with_nothing_to_fuse_is_lowered_as_ever(registered) -> None:
    program = exported(Gated().requires_grad_(False))
    x = torch.randn(1, 3, 64)
    assert (
        signal_to_noise_db(
            program.module()(x), run(lower(program, XnnpackPartitioner()).to_executorch(), x)
        )
        > 90
    )


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_unregistered_the_bytes_are_those_of_stock(partitioner) -> None:
    program = exported(nn.Sequential(nn.Linear(64, 8), nn.SiLU()))
    before = lower(program, partitioner()).to_executorch().buffer
    edgepass.register()
    edgepass.unregister()
    assert lower(program, partitioner()).to_executorch().buffer == before


@pytest.mark.parametrize(("owner", "method"), METHODS)
def test_registering_is_idempotent_and_taken_back_whole(owner, method) -> None:
    transform = "transform_for_pre_decomposition"
    before, had_transform = owner.__dict__[method], transform in owner.__dict__
    edgepass.register()
    hooked = owner.__dict__[method]
    edgepass.register()
    assert owner.__dict__[method] is hooked is not before
    assert registration.is_registered()
    edgepass.unregister()
    edgepass.unregister()
    assert owner.__dict__[method] is before
    assert (transform in owner.__dict__) == had_transform
    assert not registration.is_registered()


def test_many_threads_register_once() -> None:
    before = XnnpackPartitioner.__dict__["partition"]
    threads = [threading.Thread(target=edgepass.register) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    edgepass.unregister()
    assert XnnpackPartitioner.__dict__["partition"] is before


def test_a_partitioner_that_has_moved_is_told_and_nothing_is_hooked() -> None:
    class Moved:
        def partition(self, program, options):
            return None

    class Known:
        def partition(self, exported_program):
            return None

    stock = Known.partition
    hooks = HookSet(lambda: [Hook(each, "partition", lambda *_: None) for each in (Known, Moved)])
    with pytest.raises(
        ProgramError, match=r"got Moved.partition of parameters=\['self', 'program'"
    ):
        hooks.install()
    assert Known.partition is stock and not hooks.installed


@pytest.mark.parametrize(("tags", "acyclic"), [("aab", True), ("aba", False), ("a.a", False)])
def test_groups_that_wait_for_each_other_are_found(tags, acyclic) -> None:
    program = torch.export.export(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()), (torch.ones(2),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for node, tag in zip(calls, tags, strict=True):
        if tag != ".":
            node.meta["delegation_tag"] = tag
    assert partitioner_hooks.tags_are_acyclic(program) is tags_are_acyclic(program) is acyclic
