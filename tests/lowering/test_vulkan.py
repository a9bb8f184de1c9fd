"""Lowering to Vulkan as a whole: the file's delegate, its operators, constants and facts."""

import numpy as np
import pytest
import torch

from edgepass.lowering import report
from edgepass.lowering.stages import Stages
from edgepass.lowering.vulkan import VulkanProgram, lower_vulkan
from edgepass.ops.errors import InvalidArgumentError, ProgramError
from tests.lowering.vulkan_files import Delegate, delegates
from tests.lowering.vulkan_programs import Decoder, Mlp, export_decoder, export_tokens

LAYER = [
    "et_vk.rms_norm.default",
    "torchao.choose_qparams_affine.default",
    "et_vk.linear_dq8ca_q4gsw.default",
    *["aten.slice_copy.Tensor"] * 3,
    *["aten.view_copy.default"] * 3,
    "et_vk.apply_rotary_emb_hf.default",
    "sdpa_with_kv_cache.default",
    "aten.view_copy.default",
    "aten.mul.Tensor",
    "torchao.choose_qparams_affine.default",
    "et_vk.linear_dq8ca_q4gsw.default",
    "aten.add.Tensor",
    "et_vk.rms_norm.default",
    "torchao.choose_qparams_affine.default",
    "et_vk.linear_dq8ca_q4gsw.default",
    *["aten.slice_copy.Tensor"] * 2,
    "aten.sigmoid.default",
    *["aten.mul.Tensor"] * 3,
    "torchao.choose_qparams_affine.default",
    "et_vk.linear_dq8ca_q4gsw.default",
    "aten.add.Tensor",
]
ENDS = [
    "aten.select_copy.int",
    "aten.unsqueeze_copy.default",
    "et_vk.rms_norm.default",
    "et_vk.linear_q4gsw.default",
]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(layers=2)


@pytest.fixture(scope="module")
def lowered(decoder: Decoder) -> VulkanProgram:
    return lower_vulkan(export_decoder(decoder))


@pytest.fixture(scope="module")
def half() -> Delegate:
    (delegate,) = delegates(lower_vulkan(export_decoder(Decoder()), dtype="fp16").buffer)
    return delegate


@pytest.fixture(scope="module")
def delegate(lowered: VulkanProgram) -> Delegate:
    (delegate,) = delegates(lowered.buffer)
    return delegate


def values(delegate: Delegate, tensor: object, dtype: type) -> np.ndarray:
    return np.frombuffer(delegate.content(tensor), dtype).reshape(tensor.dims)


def test_a_decoder_is_one_delegate_of_the_stock_runtime(lowered: VulkanProgram) -> None:
    (found,) = delegates(lowered.buffer)
    assert found.backend == "VulkanBackend"
    assert report.delegates(lowered.manager) == {"forward": 1}
    assert report.outside_delegates(lowered.manager) == {"forward": {}}
    assert lowered.facts.declined == ()


def test_its_operators_are_the_fused_ones(delegate: Delegate) -> None:
    start = [name for name in delegate.operators if "prepack" not in name]
    begin = ["et_vk.select_as_symint.default", "et_vk.embedding_q4gsw.default"]
    assert start == begin + LAYER * 2 + ENDS


def test_its_inputs_are_tokens_and_position(delegate: Delegate) -> None:
    inputs = [delegate.graph.values[index].value for index in delegate.graph.input_ids]
    assert sorted(tensor.dims for tensor in inputs) == [[1], [1, 31]]
    assert all(tensor.staging_datatype.name == "INT32" for tensor in inputs)


def test_the_position_is_read_on_the_device(delegate: Delegate) -> None:
    ((source, _, _, position),) = delegate.arguments("et_vk.select_as_symint.default")
    inputs = [delegate.graph.values[index].value for index in delegate.graph.input_ids]
    assert any(source is each for each in inputs)
    assert type(position).__name__ == "SymInt"
    for arguments in delegate.arguments("sdpa_with_kv_cache.default"):
        assert arguments[5] is position
    for arguments in delegate.arguments("et_vk.apply_rotary_emb_hf.default"):
        assert arguments[4] is position


def test_attention_is_causal_without_mask_and_scale(delegate: Delegate) -> None:
    for arguments in delegate.arguments("sdpa_with_kv_cache.default"):
        mask, _, causal, scale = arguments[7:11]
        assert type(mask).__name__ == type(scale).__name__ == "Null"
        assert causal.bool_val is True


def test_weights_keep_their_bytes(delegate: Delegate, decoder: Decoder) -> None:
    layer = decoder.layers[0]
    merged = torch.cat([layer.q.packed, layer.k.packed, layer.v.packed])
    first = delegate.arguments("et_vk.linear_dq8ca_q4gsw.default")[0]
    assert np.array_equal(values(delegate, first[3], np.uint8), merged.numpy())


def test_scales_are_transposed_and_lowered(delegate: Delegate, decoder: Decoder) -> None:
    output = delegate.arguments("et_vk.linear_dq8ca_q4gsw.default")[1]
    wanted = (decoder.layers[0].o.scales.t() / 2.0**24).numpy()
    assert np.array_equal(values(delegate, output[5], np.float32), wanted)


def test_the_tied_table_is_stored_once(delegate: Delegate) -> None:
    ((table, *_),) = delegate.arguments("et_vk.embedding_q4gsw.default")
    ((_, head, *_),) = delegate.arguments("et_vk.linear_q4gsw.default")
    assert table.constant_id == head.constant_id


def test_tables_of_the_whole_context_are_written(delegate: Delegate) -> None:
    for arguments in delegate.arguments("et_vk.apply_rotary_emb_hf.default"):
        assert arguments[2].dims == arguments[3].dims == [32, 16]


def test_caches_share_one_block_of_zeros(delegate: Delegate) -> None:
    calls = delegate.arguments("sdpa_with_kv_cache.default")
    caches = [cache for arguments in calls for cache in arguments[3:5]]
    assert all(cache.dims == [1, 32, 2, 16] for cache in caches)
    keys = {delegate.graph.constants[cache.constant_id].named_key for cache in caches}
    assert len(keys) == 1
    assert not any(delegate.content(caches[0]))


def test_half_precision_keeps_the_interface(half: Delegate) -> None:
    (output,) = [half.graph.values[index].value for index in half.graph.output_ids]
    assert output.staging_datatype.name == "FLOAT32"
    assert output.datatype.name == "FLOAT16"


def test_half_precision_halves_scales_but_not_sums(half: Delegate) -> None:
    for arguments in half.arguments("et_vk.linear_dq8ca_q4gsw.default"):
        kinds = [arguments[place].datatype.name for place in (0, 1, 2, 3, 4, 5)]
        assert kinds == ["FLOAT16", "FLOAT16", "INT8", "UINT8", "INT32", "FLOAT16"]
    ((_, scales, *_),) = half.arguments("et_vk.embedding_q4gsw.default")
    assert scales.datatype.name == "FLOAT16"


def test_two_lowerings_give_the_same_bytes(lowered: VulkanProgram, decoder: Decoder) -> None:
    assert lower_vulkan(export_decoder(decoder)).buffer == lowered.buffer


def test_the_program_is_not_changed() -> None:
    program = export_decoder(Decoder())
    before = str(program), {name: id(value) for name, value in program.state_dict.items()}
    lower_vulkan(program)
    assert before == (str(program), {k: id(v) for k, v in program.state_dict.items()})


def test_each_linear_is_named_with_its_operator(lowered: VulkanProgram) -> None:
    fused = {each.weight: each.runtime_operator for each in lowered.facts.fused}
    assert fused["layers.1.down.packed"] == "et_vk.linear_dq8ca_q4gsw"
    assert fused["table.packed"] == "et_vk.linear_q4gsw"
    assert len(lowered.facts.fused) == 2 * 7 + 2


def test_a_perceptron_is_one_delegate_too() -> None:
    lowered = lower_vulkan(export_tokens(Mlp(), 64))
    assert report.delegates(lowered.manager) == {"forward": 1}
    assert report.outside_delegates(lowered.manager) == {"forward": {}}


def test_linears_need_not_be_merged() -> None:
    lowered = lower_vulkan(export_decoder(Decoder()), merge_linears=False)
    (found,) = delegates(lowered.buffer)
    assert found.operators.count("et_vk.linear_dq8ca_q4gsw.default") == 7
    assert "aten.slice_copy.Tensor" not in found.operators


def test_stages_are_announced_in_order() -> None:
    begun: list[str] = []
    lower_vulkan(export_tokens(Mlp(), 64), stages=Stages(begun.append))
    assert begun == ["rewrite", "edge", "delegate", "emit"]


def test_another_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="got dtype='bf16', accepted are fp32 or fp16"):
        lower_vulkan(export_tokens(Mlp(), 64), dtype="bf16")


def test_a_program_that_is_lowered_already_is_refused() -> None:
    lowered = lower_vulkan(export_tokens(Mlp(), 64))
    with pytest.raises(ProgramError, match="lowered already"):
        lower_vulkan(lowered.manager.exported_program())
