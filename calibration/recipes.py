"""Named recipes: how the weights and activations of a model are quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType
from torchao.utils import TorchAOBaseTensor

from edgepass.ops.errors import InvalidArgumentError

_INT4 = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not list it


@dataclass(frozen=True)
class Recipe:
    """What a name stands for.

    Weights are symmetric int4 (-8..7) in groups of input features, float scales. ``mapping`` is
    torchao's: ``SYMMETRIC_NO_CLIPPING_ERR`` takes the scale max(max / 7, -min / 8), so that no
    weight is clipped. torchao's own default, ``SYMMETRIC``, takes max(|w|) / 7.5, which clips the
    largest positive weight of a group by half a step; on the first 4,096 tokens of WikiText-2's
    validation text SmolLM2-135M in 8da4w, groups of 32, then has perplexity 25.7 instead of 21.2
    (15.8 in float).

    ``dynamic_activations``: int8 per token, asymmetric; else activations stay float.
    """

    name: str
    dynamic_activations: bool
    mapping: MappingType = MappingType.SYMMETRIC_NO_CLIPPING_ERR


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("8da4w", dynamic_activations=True),
        Recipe("4w", dynamic_activations=False),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises InvalidArgumentError, listing the known ones."""
    if name not in RECIPES:
        raise InvalidArgumentError(
            f"unknown recipe: got recipe={name!r}, accepted are {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def check_group_size(model: nn.Module, group_size: int) -> None:
    """Raise InvalidArgumentError unless ``group_size`` divides every row that is quantized.

    A weight that is quantized already is refused, too.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if isinstance(module.weight, TorchAOBaseTensor):
                raise InvalidArgumentError(
                    f"already quantized: got {name} with a {type(module.weight).__name__}, "
                    "accepted are models with float weights (or export the model yourself)"
                )
            width = module.weight.shape[1]
            if group_size < 2 or width % group_size:
                raise InvalidArgumentError(
                    f"got group_size={group_size}, which does not divide the {width} columns of "
                    f"{name}; accepted are divisors of {width} from 2 on, such as 32"
                )


def quantize_model(model: nn.Module, recipe: str = "8da4w", group_size: int = 32) -> nn.Module:
    """Quantize every linear and embedding of ``model`` in place by ``recipe``, and return it.

    A head that is tied to the embedding stays equal to it, value for value, so that later passes
    store one table. Raises InvalidArgumentError for an unknown recipe or a group size that does
    not divide a row.
    """
    linear, table = torchao_configs(recipe, group_size)
    check_group_size(model, group_size)
    _untie(model)
    quantize_(model, linear, lambda module, _: isinstance(module, nn.Linear))
    quantize_(model, table, lambda module, _: isinstance(module, nn.Embedding))
    return model


def torchao_configs(recipe: str, group_size: int) -> tuple[AOBaseConfig, AOBaseConfig]:
    """Return torchao's configurations of a recipe, for linears and for embeddings.

    Raises InvalidArgumentError for an unknown recipe.
    """
    chosen, groups = find_recipe(recipe), PerGroup(group_size)
    weight_only = IntxWeightOnlyConfig(
        weight_dtype=_INT4, granularity=groups, mapping_type=chosen.mapping
    )
    if not chosen.dynamic_activations:
        return weight_only, weight_only
    linear = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_INT4, weight_granularity=groups, weight_mapping_type=chosen.mapping
    )
    return linear, weight_only


def _untie(model: nn.Module) -> None:
    """Give modules that share a weight one parameter each: torchao replaces them one by one."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if id(module.weight) in seen:
                module.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
            seen.add(id(module.weight))
