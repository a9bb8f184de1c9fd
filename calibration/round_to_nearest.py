"""Round to nearest, on a grid that spans each group."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from edgepass.calibration.grids import (
    GridSpec,
    RoundedWeight,
    group_size_of,
    integer_range,
    round_to,
    safe_scale,
)

_TORCHAO = {
    "symmetric": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "asymmetric": MappingType.ASYMMETRIC,
}


def round_to_nearest(weight: Tensor, spec: GridSpec) -> RoundedWeight:
    """Round ``weight`` ``[N, K]`` by the least and largest value of each group.

    ``symmetric`` and ``asymmetric`` are torchao's (``SYMMETRIC_NO_CLIPPING_ERR``, ``ASYMMETRIC``);
    ``float_offset`` maps the least value to the least integer, as llama.cpp's Q4_1 does.
    """
    size = group_size_of(weight, spec)
    if spec.mapping == "float_offset":
        return _span(weight, spec, size)
    low, high = integer_range(spec.bits)
    scale, zero = choose_qparams_affine(
        weight,
        _TORCHAO[spec.mapping],
        (1, size),
        target_dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    values = quantize_affine(weight, (1, size), scale, zero, torch.int8, low, high)
    return RoundedWeight(values, scale.float(), zero if spec.mapping == "asymmetric" else None)


def _span(weight: Tensor, spec: GridSpec, size: int) -> RoundedWeight:
    groups = weight.float().reshape(-1, size)
    scale, zero = spanning_grid(groups, spec.bits)
    shape = (weight.shape[0], -1)
    values = round_to(groups, scale, zero, spec.bits).to(torch.int8)
    return RoundedWeight(values.reshape(weight.shape), scale.reshape(shape), zero.reshape(shape))


def spanning_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and float zero point ``[..]`` with both ends of each of ``groups`` ``[.., g]`` on it.

    A group of one value v gets the scale ``|v|``, on whose grid v lies.
    """
    low, high = groups.aminmax(dim=-1)
    flat = high == low
    scale = safe_scale(torch.where(flat, low.abs(), (high - low) / ((1 << bits) - 1)))
    return scale, integer_range(bits)[0] - low / scale
