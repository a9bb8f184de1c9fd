"""The operators that the Vulkan runtime registers, by the names that programs carry.

Stock's partitioner knows 25 more: those it hopes that a later pass removes, and some, as
``aten.logical_not``, that no pass removes and no device can load. One set a runtime, from
``VK_REGISTER_OP`` in the runtime's ``graph/ops/impl``.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgepass.lowering.vulkan_legality import RUNTIME

_NAMES = """
add aten._log_softmax.default aten._native_batch_norm_legit_no_training.default
aten._softmax.default aten._to_copy.default aten._weight_int8pack_mm.default aten.abs.default
aten.add.Tensor aten.addmm.default aten.amax.default aten.amin.default aten.arange.start_step
aten.argmax.default aten.argmin.default aten.avg_pool2d.default aten.bitwise_and.Tensor
aten.bitwise_not.default aten.bitwise_or.Tensor aten.bmm.default aten.cat.default
aten.clamp.default aten.clone.default aten.constant_pad_nd.default aten.convolution.default
aten.cos.default aten.div.Tensor aten.div.Tensor_mode aten.embedding.default aten.eq.Scalar
aten.eq.Tensor aten.exp.default aten.expand_copy.default aten.flip.default aten.full.default
aten.full_like.default aten.gather.default aten.ge.Scalar aten.ge.Tensor aten.gelu.default
aten.grid_sampler_2d.default aten.gt.Scalar aten.gt.Tensor aten.hardshrink.default
aten.hardsigmoid.default aten.hardswish.default aten.hardtanh.default aten.index.Tensor
aten.index_select.default aten.le.Scalar aten.le.Tensor aten.leaky_relu.default
aten.linear.default aten.log10.default aten.logical_and.default aten.logical_or.default
aten.lt.Scalar aten.lt.Tensor aten.max_pool2d.default aten.max_pool2d_with_indices.default
aten.mean.dim aten.minimum.default aten.mm.default aten.mul.Tensor
aten.native_group_norm.default aten.native_layer_norm.default aten.ne.Scalar aten.neg.default
aten.ones.default aten.ones_like.default aten.permute.default aten.permute_copy.default
aten.pixel_shuffle.default aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor aten.relu.default
aten.relu6.default aten.repeat.default aten.repeat_interleave.self_int aten.round.default
aten.rsqrt.default aten.scalar_tensor.default aten.select.int aten.select_copy.int
aten.sigmoid.default aten.sin.default aten.slice.Tensor aten.slice_copy.Tensor
aten.split_with_sizes_copy.default aten.sqrt.default aten.squeeze_copy.dims aten.sub.Tensor
aten.sum.dim_IntList aten.tan.default aten.tanh.default aten.unfold_copy.default
aten.unsqueeze_copy.default aten.upsample_bilinear2d.vec aten.upsample_nearest2d.vec
aten.var.dim aten.view_copy.default aten.where.self aten.zeros.default aten.zeros_like.default
conv_with_clamp.default dim_order_ops._to_dim_order_copy.default et_vk.adamw_step.default
et_vk.apply_rotary_emb.default et_vk.apply_rotary_emb_hf.default
et_vk.apply_rotary_emb_interleaved.default et_vk.conv1d_dw.default et_vk.conv1d_pw.default
et_vk.conv2d_gemm.default et_vk.conv2d_q8csw.default et_vk.conv2d_q8ta_q8csw.default
et_vk.conv2d_q8ta_q8csw_q8to.default et_vk.conv2d_q8ta_q8csw_q8to_dw.default
et_vk.conv_with_clamp.default et_vk.embedding_q4gsw.default et_vk.fused_ce.default
et_vk.grid_priors.default et_vk.linear_dW.default et_vk.linear_dq8ca_q4gsw.default
et_vk.linear_q4gsw.default et_vk.linear_q4gsw_backward.default et_vk.linear_q8csw.default
et_vk.linear_q8ta_q8csw.default et_vk.linear_qcs4w.default et_vk.prepack.default
et_vk.q4gsw_linear.default et_vk.q4gsw_requant.default et_vk.q8ta_add.default
et_vk.q8ta_conv2d.default et_vk.q8ta_conv2d_dw.default et_vk.q8ta_conv2d_general.default
et_vk.q8ta_conv2d_im2col.default et_vk.q8ta_conv2d_pw.default
et_vk.q8ta_conv2d_transposed.default et_vk.q8ta_linear.default et_vk.q8ta_linear_gemv.default
et_vk.q8ta_pixel_shuffle.default et_vk.q8ta_relu.default et_vk.rms_norm.default
et_vk.sdpa.default et_vk.select_as_symint.default etvk.choose_qparams_per_row.default
etvk.test_conv2d_q8ta_q8csw_q8to.default floordiv llama.custom_sdpa.default mul
quantized_decomposed.dequantize_per_tensor.default
quantized_decomposed.quantize_per_tensor.default sdpa_with_kv_cache.default sub sym_size.int
testing.compute_attn_weight_with_kv_cache.default torchao.choose_qparams_affine.default
update_cache.default
"""
OPERATORS: Mapping[str, frozenset[str]] = {RUNTIME: frozenset(_NAMES.split())}
# Names in a graph that a program writes in another way, or not at all.
_SPELLINGS = {
    "getitem": "",
    "llama.sdpa_with_kv_cache.default": "sdpa_with_kv_cache.default",
    "llama.update_cache.default": "update_cache.default",
}


def has_operator(name: str, runtime: str = RUNTIME) -> bool:
    """Tell whether a runtime has the operator that a graph calls ``name``."""
    written = _SPELLINGS.get(name, name)
    return not written or written in OPERATORS[runtime]
