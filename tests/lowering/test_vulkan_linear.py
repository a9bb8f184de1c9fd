"""Linears and embeddings in the runtime's form: exact constants, same numbers, or a reason."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepass.lowering.vulkan_linear import group_sums
from edgepass.lowering.vulkan_rewrite import Rewritten, rewrite_for_vulkan
from edgepass.ops import unpack_int4
from edgepass.passes.targets import is_call
from tests.lowering.vulkan_programs import (
    Decoder,
    EagerRun,
    ForeignLinear,
    Mlp,
    QuantizedLinear,
    export_decoder,
    export_tokens,
    fused,
    sqnr_db,
)

_GROUPS = (4, 8, 12, 16, 32, 64, 128)


class Branches(nn.Module):
    """Several linears of one activation, as Q, K and V are."""

    def __init__(self, k: int, outputs: tuple[int, ...], group_size: int, bias: bool = False):
        super().__init__()
        self.linears = nn.ModuleList(
            QuantizedLinear(k, n, group_size, bias, seed=i) for i, n in enumerate(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        quantized = fused.quantize_per_token(x)
        return torch.cat([linear(quantized) for linear in self.linears], dim=-1)


class Foreign(Branches):
    def __init__(self, k: int, outputs: tuple[int, ...], group_size: int, bias: bool = False):
        super().__init__(k, outputs, group_size, bias)
        self.linears = nn.ModuleList(ForeignLinear(k, n, group_size, bias) for n in outputs)


class WeightOnly(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear.of_float(x) for linear in self.linears], dim=-1)


def rewrite(module: nn.Module, width: int, *, merge: bool = True, half: bool = False) -> Rewritten:
    return rewrite_for_vulkan(export_tokens(module, width), merge=merge, half=half)


def calls(rewritten: Rewritten, name: str) -> list[torch.fx.Node]:
    return [node for node in rewritten.program.graph.nodes if is_call(node, name)]


def constant(rewritten: Rewritten, node: torch.fx.Node) -> Tensor:
    program = rewritten.program
    return program.state_dict[program.graph_signature.inputs_to_buffers[node.name]]


def reason(module: nn.Module, width: int, lead: tuple[int, ...] = (1,)) -> str:
    program = export_tokens(module, width, lead)
    declined = rewrite_for_vulkan(program, merge=True, half=False).declined
    assert declined
    return declined[0].reason


shapes = st.tuples(
    st.integers(1, 4),
    st.lists(st.integers(1, 6).map(lambda n: 8 * n), min_size=1, max_size=3).map(tuple),
    st.sampled_from(_GROUPS),
)


@given(shape=shapes, bias=st.booleans(), merge=st.booleans(), half=st.booleans())
@settings(max_examples=8)
def test_numbers_are_those_of_the_fused_program(
    shape: tuple[int, tuple[int, ...], int], bias: bool, merge: bool, half: bool
) -> None:
    groups, outputs, group_size = shape
    width = groups * group_size
    program = export_tokens(Branches(width, outputs, group_size, bias), width)
    rewritten = rewrite_for_vulkan(program, merge=merge, half=half)
    x = torch.randn(1, 6, width)
    assert rewritten.declined == ()
    assert sqnr_db(EagerRun(rewritten)(x), EagerRun(program)(x)) > 110


@given(outputs=st.lists(st.sampled_from([8, 16, 40]), min_size=1, max_size=3).map(tuple))
@settings(max_examples=4)
def test_weight_only_numbers_are_those_of_the_fused_program(outputs: tuple[int, ...]) -> None:
    program = export_tokens(WeightOnly(64, outputs, 32, bias=True), 64)
    rewritten = rewrite_for_vulkan(program, merge=True, half=False)
    x = torch.randn(1, 6, 64)
    assert sqnr_db(EagerRun(rewritten)(x), EagerRun(program)(x)) > 120


def test_linears_of_one_activation_are_one_with_slices() -> None:
    rewritten = rewrite(Branches(64, (24, 8, 16), 32), 64)
    (linear,) = calls(rewritten, "et_vk.linear_dq8ca_q4gsw")
    cuts = [node.args[1:] for node in calls(rewritten, "aten.slice")]
    assert linear.meta["val"].shape[-1] == 48
    assert cuts == [(2, 0, 24), (2, 24, 32), (2, 32, 48)]
    assert len(calls(rewritten, "torchao.choose_qparams_affine")) == 1
    assert calls(rewritten, "aten.split") == []


def test_linears_of_several_group_sizes_stay_apart() -> None:
    module = Branches(64, (8, 16), 32)
    module.linears[1] = QuantizedLinear(64, 16, 16)
    rewritten = rewrite(module, 64)
    assert len(calls(rewritten, "et_vk.linear_dq8ca_q4gsw")) == 2
    assert len(calls(rewritten, "torchao.choose_qparams_affine")) == 1


def test_a_single_weight_keeps_its_bytes() -> None:
    module = Branches(64, (24,), 32)
    rewritten = rewrite(module, 64)
    (linear,) = calls(rewritten, "et_vk.linear_dq8ca_q4gsw")
    assert constant(rewritten, linear.args[3]).data_ptr() == module.linears[0].packed.data_ptr()


def test_scales_and_sums_are_transposed() -> None:
    module = Branches(64, (24, 8), 32)
    rewritten = rewrite(module, 64)
    (linear,) = calls(rewritten, "et_vk.linear_dq8ca_q4gsw")
    weights = torch.cat([unpack_int4(each.packed, 64) for each in module.linears])
    sums = weights.int().reshape(32, 2, 32).sum(-1).t()
    # The activation is multiplied by what the scales are divided by.
    scales = torch.cat([each.scales for each in module.linears]).t() / 2.0**24
    assert constant(rewritten, linear.args[4]).dtype == torch.int32
    assert torch.equal(constant(rewritten, linear.args[4]), sums.int())
    assert torch.equal(constant(rewritten, linear.args[5]), scales)


def test_columns_are_padded_to_words_of_eight() -> None:
    rewritten = rewrite(Branches(12, (8,), 4), 12)
    (linear,) = calls(rewritten, "et_vk.linear_dq8ca_q4gsw")
    packed = constant(rewritten, linear.args[3])
    assert packed.shape == (8, 8)
    assert (packed[:, 6:] == 0x88).all()
    assert constant(rewritten, linear.args[4]).shape == (3, 8)


@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from(_GROUPS))
def test_group_sums_are_those_of_the_unpacked_weight(n: int, groups: int, size: int) -> None:
    linear = QuantizedLinear(groups * size, n, size)
    wanted = unpack_int4(linear.packed, groups * size).int().reshape(n, groups, size).sum(-1)
    assert torch.equal(group_sums(linear.packed, size), wanted.t().int())


def test_a_linear_of_one_token_is_weight_only() -> None:
    class LastToken(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, -1:])

    rewritten = rewrite(LastToken(64, (8,), 32), 64)
    assert len(calls(rewritten, "et_vk.linear_q4gsw")) == 1
    assert calls(rewritten, "torchao.choose_qparams_affine") == []
    assert rewritten.fused[0].runtime_operator == "et_vk.linear_q4gsw"


def test_biases_are_added_apart_in_half_precision() -> None:
    rewritten = rewrite(Branches(64, (8, 16), 32, bias=True), 64, half=True)
    (linear,) = calls(rewritten, "et_vk.linear_dq8ca_q4gsw")
    (addition,) = calls(rewritten, "aten.add")
    assert linear.args[7] is None
    assert constant(rewritten, addition.args[1]).shape == (1, 1, 24)


def test_the_tied_table_is_one_constant() -> None:
    rewritten = rewrite_for_vulkan(export_decoder(Decoder()), merge=True, half=False)
    (embedding,) = calls(rewritten, "et_vk.embedding_q4gsw")
    head = calls(rewritten, "et_vk.linear_q4gsw")[-1]
    assert embedding.args[0] is head.args[1]


def test_each_fused_weight_is_named() -> None:
    rewritten = rewrite(Branches(64, (8, 16), 32), 64)
    assert [each.weight for each in rewritten.fused] == ["linears.0.packed", "linears.1.packed"]


def test_declined_weights_are_named() -> None:
    (declined,) = rewrite(Foreign(64, (8,), 32), 64).declined
    assert declined.weight == "linears.0.packed"
    assert declined.operator == "edgepass.linear_qta8a_qga4w"


def test_reason_of_a_scale_floor_above_the_runtimes() -> None:
    class Floored(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.linears[0](fused.quantize_per_token(x, 0.01))

    wanted = "its activation's scales are at least 0.01, the runtime's less"
    assert reason(Floored(64, (8,), 32), 64) == wanted


def test_reason_of_encodings_from_elsewhere() -> None:
    wanted = "its activation is not quantized by quantize_per_token"
    assert reason(Foreign(64, (8,), 32), 64) == wanted


def test_declined_linears_compute_the_same_outside() -> None:
    module = Foreign(64, (12,), 32, bias=True)
    program = export_tokens(module, 64)
    rewritten = rewrite_for_vulkan(program, merge=True, half=False)
    x = torch.randn(1, 6, 64)
    assert len(rewritten.declined) == 1
    assert sqnr_db(EagerRun(rewritten)(x), EagerRun(program)(x)) > 110


def test_a_second_layer_quantizes_its_own_activation() -> None:
    rewritten = rewrite(Mlp(), 64)
    assert len(calls(rewritten, "torchao.choose_qparams_affine")) == 2
