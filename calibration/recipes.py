"""Quantizing a model in place by a recipe."""

from __future__ import annotations

import os

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.ops.errors import InvalidArgumentError

__all__ = ["find_recipe", "quantize_model", "torchao_config"]

# The scale is max(max / 7, -min / 8), so that no weight is clipped. torchao's own default,
# SYMMETRIC, takes max(|w|) / 7.5, which clips the largest positive weight of a group by half a
# step; on the first 4,096 tokens of WikiText-2's validation text SmolLM2-135M in 8da4w, groups of
# 32, then has perplexity 25.7 instead of 21.2 (15.8 in float).
_MAPPINGS = {
    "symmetric": MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "asymmetric": MappingType.ASYMMETRIC,
}


def quantize_model(
    model: nn.Module,
    recipe: str | os.PathLike[str] | Recipe = "8da4w",
    group_size: int | None = None,
) -> nn.Module:
    """Quantize the linears and embeddings of ``model`` in place by ``recipe``, and return it.

    ``recipe`` is the name of a preset, the path of a recipe file, or a Recipe; ``group_size``
    takes the place of the one that it has by default. A head that is tied to the embedding stays
    equal to it, value for value, if both get the same, so that later passes store one table.

    Raises InvalidArgumentError for an unknown recipe, one that needs another flow (static
    activations), or one that does not fit the model; the model is then as it was.
    """
    chosen = find_recipe(recipe)
    if group_size is not None:
        chosen = chosen.with_group_size(group_size)
    planned = plan_modules(model, chosen)
    configs = {each: torchao_config(each) for each in set(planned.values())}
    _untie(model)
    for each, config in configs.items():
        if config is not None:
            quantize_(model, config, lambda _, path, each=each: planned.get(path) == each)
    return model


def torchao_config(module: ModuleRecipe) -> AOBaseConfig | None:
    """torchao's configuration for what a module gets; None for a module that stays float.

    Raises InvalidArgumentError for what torchao's integer flow has no form of.
    """
    weights, activations = module.weights, module.activations
    if weights.bits is None:
        return None
    _require("weights.bits", weights.bits, 2, 3, 4, 5, 6, 7, 8)
    _require("weights.granularity", weights.granularity, "group", "channel")
    _require("weights.mapping", weights.mapping, *_MAPPINGS)
    _require("weights.algorithm", weights.algorithm, "rtn")
    _require("activations.kind", activations.kind, "dynamic", "none")
    dtype = getattr(torch, f"int{weights.bits}")
    groups: Granularity = PerAxis(0)
    if weights.group_size is not None:
        groups = PerGroup(weights.group_size)
    mapping = _MAPPINGS[weights.mapping]
    if activations.kind == "none":
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=groups, mapping_type=mapping)
    _require("activations.bits", activations.bits, 8)
    _require("activations.granularity", activations.granularity, "token")
    _require("activations.mapping", activations.mapping, "asymmetric")
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=groups, weight_mapping_type=mapping
    )


def _require(name: str, value: object, *accepted: object) -> None:
    if value not in accepted:
        raise InvalidArgumentError(
            f"got {name}={value} for torchao's integer weights, accepted are "
            f"{', '.join(map(str, accepted))}"
        )


def _untie(model: nn.Module) -> None:
    """Give modules that share a weight one parameter each: torchao replaces them one by one."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if id(module.weight) in seen:
                module.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            seen.add(id(module.weight))
