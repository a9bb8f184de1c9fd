"""The quantization recipes of the QNN backend, and the chips that it knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import AnyRecipe, find_recipe
from edgepass.calibration.recipe_observers import AnyObserver, MinMax
from edgepass.calibration.recipe_presets import PRESETS
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.lowering.recipe_legality import check_legality
from edgepass.lowering.recipe_rules import activation_bits
from edgepass.ops.errors import InvalidArgumentError

DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class QnnRecipe:
    """What the backend is told: ``activation_bits`` 8 or 16, None for fp16; ``weight_bits``.

    Activations are asymmetric, one encoding a tensor; weights symmetric, one a channel, or with
    ``blocks`` one a block of input features (LPBQ). ``name`` is the stock ``QuantDtype``'s. With
    8-bit activations only the linears compute in 8 bits: HTP's norms and softmax of 8 bits are off
    by whole steps (13 dB for the logits of one layer), so these and what is between them have 16.
    ``observer`` finds the ranges of activations; caches and what is between the linears take the
    default's. ``asked`` is the recipe that this is part of: it may ask for others for some modules.
    """

    name: str
    activation_bits: int | None
    weight_bits: int
    blocks: bool = False
    observer: AnyObserver = field(default_factory=lambda: MinMax(kind="min_max"))
    asked: Recipe = field(default_factory=lambda: PRESETS["16a4w_block"], compare=False)

    @property
    def kv_bits(self) -> int:
        """The bits of the KV cache: 16 for floats, 8 if the recipe does not say."""
        if self.activation_bits is None:
            return 16
        return 8 if self.asked.kv_bits is None else self.asked.kv_bits

    @property
    def rows_as_blocks(self) -> bool:
        """Whether each row of weights is one LPBQ block, the same numbers in another form.

        HTP cuts the sums of 16-bit activations off at 256 products of steps. With 4-bit weights
        that is 4 to 12 steps of the output, 54 to 63 dB; LPBQ weights are 8 bits inside, which
        leaves a sixteenth of it. Block observers do not train, so that training has rows as such.
        """
        form = (self.activation_bits, self.weight_bits, self.blocks)
        return form == (16, 4, False) and not self.asked.qat

    @property
    def block_size(self) -> int:
        """The input features of a block by default."""
        return self.asked.for_module("").weights.group_size or DEFAULT_BLOCK_SIZE

    def quant_dtype(self) -> Any:
        """The member of the stock backend's ``QuantDtype``."""
        from executorch.backends.qualcomm.quantizer.quantizer import QuantDtype

        return QuantDtype[f"use_{self.name}{'_block' if self.rows_as_blocks else ''}"]


def qnn_recipe(module: ModuleRecipe) -> QnnRecipe:
    """What the backend is told of a linear that gets ``module``, which must be legal for it."""
    weights, bits = module.weights, activation_bits(module)
    blocks = weights.granularity == "block"
    assert weights.bits is not None, "check_legality refuses float weights"
    name = f"{'fp16' if bits is None else bits}a{weights.bits}w{'_block' if blocks else ''}"
    return QnnRecipe(name, bits, weights.bits, blocks, module.observer)


QNN_RECIPES = {
    name: replace(qnn_recipe(recipe.for_module("")), asked=recipe)
    for name, recipe in PRESETS.items()
    if recipe.backend == "qnn" and not recipe.qat
}


def find_qnn_recipe(recipe: AnyRecipe) -> QnnRecipe:
    """What the backend is told of ``recipe``: a name, an alias, a file's path or a Recipe.

    Raises InvalidArgumentError for one that HTP cannot hold.
    """
    asked = find_recipe(recipe)
    check_legality(asked, "qnn")
    return replace(qnn_recipe(asked.for_module("")), asked=asked)


def check_kv_bits(recipe: QnnRecipe, kv_bits: int) -> None:
    """Raise InvalidArgumentError unless a KV cache of ``kv_bits`` fits the recipe."""
    accepted: tuple[int, ...]
    if recipe.activation_bits is None:
        accepted = (16,)
    else:
        accepted = (8,) if recipe.activation_bits == 8 else (8, 16)
    if kv_bits not in accepted:
        raise InvalidArgumentError(
            f"got kv_bits={kv_bits} for recipe={recipe.name}, accepted are "
            f"{', '.join(map(str, accepted))}"
        )


def check_chip(recipe: QnnRecipe, kv_bits: int | None, soc: Any) -> None:
    """Raise InvalidArgumentError for 16-bit caches on a chip that multiplies no 16 by 16 bits."""
    from executorch.backends.qualcomm.serialization.qc_schema import HtpArch
    from executorch.backends.qualcomm.utils.utils import get_soc_to_htp_arch_map

    architecture = get_soc_to_htp_arch_map()[soc.name]
    bits = recipe.kv_bits if kv_bits is None else kv_bits
    if recipe.activation_bits and bits == 16 and architecture < HtpArch.V73:
        raise InvalidArgumentError(
            f"got kv_bits=16 for soc={soc.name}, whose HTP is {architecture.name}, accepted is 8, "
            f"or a chip of {HtpArch.V73.name} or newer"
        )


def find_chip(name: str) -> Any:
    """The stock backend's chip of that name. Raises InvalidArgumentError, listing those known."""
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import get_soc_to_chipset_map

    known = get_soc_to_chipset_map()
    if name not in known:
        raise InvalidArgumentError(
            f"unknown chip: got soc={name!r}, accepted are {', '.join(sorted(known))}"
        )
    assert isinstance(known[name], QcomChipset), "the map gives chips"
    return known[name]
