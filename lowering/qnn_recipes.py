"""The quantization recipes of the QNN backend, and the chips that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgepass.ops.errors import InvalidArgumentError


@dataclass(frozen=True)
class QnnRecipe:
    """What a name stands for: ``activation_bits`` 8 or 16, None for fp16; ``weight_bits``.

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


QNN_RECIPES = {
    recipe.name: recipe
    for recipe in (
        QnnRecipe("8a8w", 8, 8),
        QnnRecipe("16a8w", 16, 8),
        QnnRecipe("16a16w", 16, 16),
        QnnRecipe("16a4w", 16, 4),
        QnnRecipe("16a4w_block", 16, 4, blocks=True),
        QnnRecipe("8a4w", 8, 4),
        QnnRecipe("fp16a8w", None, 8),
    )
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
