"""Shapes of the runtime's operators, so that a graph holding them can be traced quickly.

The stock wheel defines the ``et_vk`` operators by Python reference code only. Tracing runs that
code on fake tensors, once a pass (16 passes a delegate), and ``apply_rotary_emb_hf`` cannot be
traced with a dynamic start at all. The kernels below only give shapes; what is computed is
unchanged. When stock gains one of its own, ``tests/lowering/test_vulkan_kernels.py`` fails and the
line here goes.
"""

from __future__ import annotations

import executorch.backends.vulkan.custom_ops_lib  # noqa: F401  (defines the et_vk operators)
import torch
import torchao.quantization.quant_primitives  # noqa: F401  (defines choose_qparams_affine)
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama operators)
from torch import Tensor

_LIBRARY = torch.library.Library("et_vk", "IMPL")


def _linear(x: Tensor, weights: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights.shape[0]))


def _quantized_linear(
    x: Tensor, scale: Tensor, zero: Tensor, weights: Tensor, *rest: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights.shape[0]))


def _embedding(
    weight: Tensor, scales: Tensor, group_size: int, ids: Tensor, is_linear_weight: bool = False
) -> Tensor:
    return scales.new_empty((*ids.shape, weight.shape[1] * 2))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _rotate_pair(q: Tensor, k: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


MISSING_META_KERNELS = {
    "linear_q4gsw": _linear,
    "linear_dq8ca_q4gsw": _quantized_linear,
    "embedding_q4gsw": _embedding,
    "rms_norm": _rms_norm,
    "apply_rotary_emb": _rotate_pair,
    "apply_rotary_emb_hf": _rotate_pair,
}
for _name, _kernel in MISSING_META_KERNELS.items():
    _LIBRARY.impl(_name, _kernel, "Meta")
