"""What a module gets, as torchao's own configuration: for flows that call torchao themselves."""

from __future__ import annotations

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from edgepass.calibration.recipe_resolution import ModuleRecipe

# The scale is max(max / 7, -min / 8), so that no weight is clipped. torchao's own default,
# SYMMETRIC, takes max(|w|) / 7.5, which clips the largest positive weight of a group by half a
# step; on the first 4,096 tokens of WikiText-2's validation text SmolLM2-135M in 8da4w, groups of
# 32, then has perplexity 25.7 instead of 21.2 (15.8 in float).
MAPPING_TYPES = {
    "symmetric": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "asymmetric": MappingType.ASYMMETRIC,
}


def torchao_config(module: ModuleRecipe) -> AOBaseConfig:
    """torchao's configuration of a module that ``check_torchao_form`` accepts, rounded to nearest.

    The weight is neither float nor on a grid of float offsets: torchao has no configuration of it.
    """
    weights = module.weights
    dtype = getattr(torch, f"int{weights.bits}")
    size, mapping = weights.group_size, MAPPING_TYPES[weights.mapping]
    groups: Granularity = PerAxis(0) if size is None else PerGroup(size)
    if module.activations.kind == "none":
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=groups, mapping_type=mapping)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=groups, weight_mapping_type=mapping
    )
