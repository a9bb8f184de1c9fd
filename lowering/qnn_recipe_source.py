"""A recipe for QNN as Python that makes the stock backend's ``QuantRecipe``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgepass.calibration.recipe import Recipe
from edgepass.lowering.qnn_recipes import QnnRecipe, qnn_recipe

_HEAD = '''"""What `edgepass allocate` chose, for the stock Qualcomm quantizer: {name}."""

import torch
from executorch.backends.qualcomm.quantizer.quant_recipe import QuantGranularity, QuantRecipe
from executorch.backends.qualcomm.quantizer.quantizer import QuantDtype
from torchao.quantization.pt2e import MinMaxObserver

recipe = QuantRecipe(
    QuantDtype.{plain},
    False,
    act_observer=MinMaxObserver,
    granularity=QuantGranularity.PER_TENSOR,
)
recipe.add_node_target(
    {{torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}},
    QuantDtype.{dtype},
    False,
    act_observer=MinMaxObserver,
    granularity=QuantGranularity.{granularity},{extra}
)
'''
_RULE = """recipe.add_regex(
    {{{patterns}}},
    QuantDtype.{dtype},
    False,
    act_observer=MinMaxObserver,
    granularity=QuantGranularity.{granularity},{extra}
)
"""


def qnn_recipe_source(recipe: Recipe, modules: Sequence[str]) -> str:
    """The text of a Python file whose ``recipe`` is the stock ``QuantRecipe`` of the same choices.

    ``modules`` are the paths of the linears that are chosen for. Those that get what the recipe
    gives by default have no rule of their own; the others are listed by what they get. Blocks are
    of ``[1, block size, 1, 1]``, of 1x1 convolutions, as HTP computes them.
    """
    base = recipe.for_module("")
    default = qnn_recipe(base)
    rules: dict[tuple[str, int | None], list[str]] = {}
    for path in modules:
        module = recipe.for_module(path)
        told, size = qnn_recipe(module), module.weights.group_size
        if module.weights != base.weights or module.activations != base.activations:
            rules.setdefault((told.name, size if told.blocks else None), []).append(path)
    parts = [_HEAD.format(name=recipe.name, **_fields(default, base.weights.group_size))]
    for (name, size), paths in rules.items():
        patterns = ", ".join(f'r"{re.escape(path)}$"' for path in paths)
        dtype = f"use_{name}"
        parts.append(
            _RULE.format(
                patterns=patterns, dtype=dtype, granularity=_granularity(size), extra=_extra(size)
            )
        )
    return "\n".join(parts)


def _fields(recipe: QnnRecipe, size: int | None) -> dict[str, str]:
    blocks = size if recipe.blocks else None
    bits = recipe.activation_bits
    return {
        "plain": "use_fp16a8w" if bits is None else f"use_{bits}a8w",
        "dtype": f"use_{recipe.name}",
        "granularity": _granularity(blocks),
        "extra": _extra(blocks),
    }


def _granularity(size: int | None) -> str:
    return "PER_CHANNEL" if size is None else "PER_BLOCK"


def _extra(size: int | None) -> str:
    return "" if size is None else f'\n    extra_kwargs={{"block_size": (1, {size}, 1, 1)}},'
