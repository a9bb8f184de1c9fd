"""The quantization recipes of the QNN backend, and the chips that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgepass.calibration.recipe import Role
from edgepass.calibration.recipe_presets import PRESETS
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.lowering.recipe_part import Part
from edgepass.ops.errors import InvalidArgumentError

# Weight bits that the stock quantizer has beside the bits of activations (None: fp16).
_WEIGHT_BITS: dict[int | None, tuple[int, ...]] = {8: (8, 4), 16: (16, 8, 4), None: (8,)}


@dataclass(frozen=True)
class QnnRecipe:
    """What the backend is told: ``activation_bits`` 8 or 16, None for fp16; ``weight_bits``.

    Activations are asymmetric, one encoding a tensor; weights symmetric, one a channel, or with
    ``blocks`` one a block of input features (LPBQ). ``name`` is the stock ``QuantDtype``'s. With
    8-bit activations only the linears compute in 8 bits: HTP's norms and softmax of 8 bits are off
    by whole steps (13 dB for the logits of one layer), so these and what is between them have 16.
    """

    name: str
    activation_bits: int | None
    weight_bits: int
    blocks: bool = False

    def quant_dtype(self) -> Any:
        """The member of the stock backend's ``QuantDtype``."""
        from executorch.backends.qualcomm.quantizer.quantizer import QuantDtype

        return QuantDtype[f"use_{self.name}"]


def qnn_recipe(module: ModuleRecipe) -> QnnRecipe:
    """What the backend is told of a linear that gets ``module``, which must be legal for it."""
    activations, weights = module.activations, module.weights
    bits = None if activations.kind == "none" else activations.bits
    blocks = weights.granularity == "block"
    assert weights.bits is not None, "qnn_parts refuses float weights"
    name = f"{'fp16' if bits is None else bits}a{weights.bits}w{'_block' if blocks else ''}"
    return QnnRecipe(name, bits, weights.bits, blocks)


def qnn_parts(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    """What HTP does not hold of a module's recipe."""
    weights, activations = module.weights, module.activations
    if role == "embedding":
        if weights.bits is not None:
            yield Part("weights.bits", weights.bits, "none")
        return
    bits = None if activations.kind == "none" else activations.bits
    accepted = _WEIGHT_BITS[bits]
    if weights.bits not in accepted:
        asked = 32 if weights.bits is None else weights.bits
        yield Part(
            "weights.bits", weights.bits or "none", min(accepted, key=lambda b: abs(b - asked))
        )
    if weights.granularity == "group":
        yield Part("weights.granularity", "group", "block" if bits == 16 else "channel")
    elif weights.granularity == "tensor":
        yield Part("weights.granularity", "tensor", "channel")
    elif weights.granularity == "block" and (bits != 16 or weights.bits != 4):
        yield Part("weights.granularity", "block", "channel")
    wanted = {"weights.mapping": "symmetric", "weights.algorithm": "rtn"}
    if activations.kind != "none":
        wanted |= {
            "activations.kind": "static",
            "activations.granularity": "tensor",
            "activations.mapping": "asymmetric",
        }
    for key, nearest in wanted.items():
        section, _, field = key.partition(".")
        value = getattr(getattr(module, section), field)
        if value != nearest:
            yield Part(key, value, nearest)


QNN_RECIPES = {
    name: qnn_recipe(recipe.for_module(""))
    for name, recipe in PRESETS.items()
    if recipe.backend == "qnn" and not recipe.qat
}


def find_qnn_recipe(name: str) -> QnnRecipe:
    """The recipe of that name. Raises InvalidArgumentError, listing the known ones."""
    if name not in QNN_RECIPES:
        raise InvalidArgumentError(
            f"unknown recipe: got recipe={name!r} for backend=qnn, accepted are "
            f"{', '.join(QNN_RECIPES)}"
        )
    return QNN_RECIPES[name]


def check_kv_bits(recipe: QnnRecipe, kv_bits: int) -> None:
    """Raise InvalidArgumentError unless a KV cache of ``kv_bits`` fits the recipe."""
    if recipe.activation_bits is None:
        accepted = (16,)
    else:
        accepted = (8,) if recipe.activation_bits == 8 else (8, 16)
    if kv_bits not in accepted:
        raise InvalidArgumentError(
            f"got kv_bits={kv_bits} for recipe={recipe.name}, accepted are "
            f"{', '.join(map(str, accepted))}"
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
