"""What one module gets: the sections of a recipe laid over each other, with every field filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgepass.calibration.recipe_observers import AnyObserver
from edgepass.calibration.recipe_sections import Activations, Weights
from edgepass.ops.errors import InvalidArgumentError

Granularity = Literal["tensor", "channel", "group", "block"]
Mapping = Literal["symmetric", "asymmetric", "float_offset"]
Algorithm = Literal["rtn", "hqq", "mse", "seqmse", "gptq"]
_SIZES = {"group": "group_size", "block": "block_size"}


@dataclass(frozen=True)
class WeightSpec:
    """How one weight ``[N, K]`` is stored: see ``recipe_sections.Weights``.

    ``bits`` is None for a weight that stays float. ``group_size``: the columns that share a scale,
    of a group or of a block; None if a whole row or tensor shares it.
    """

    bits: int | None = 4
    granularity: Granularity = "group"
    group_size: int | None = 32
    mapping: Mapping = "symmetric"
    algorithm: Algorithm = "rtn"

    @property
    def low(self) -> int:
        """The least integer."""
        assert self.bits is not None, "a float weight has no integers"
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest integer."""
        return -self.low - 1


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of one linear is quantized: see ``recipe_sections.Activations``.

    With kind ``none`` the other fields say nothing.
    """

    kind: Literal["dynamic", "static", "none"] = "none"
    bits: int = 8
    granularity: Literal["tensor", "token"] = "tensor"
    mapping: Literal["symmetric", "asymmetric"] = "asymmetric"


@dataclass(frozen=True)
class ModuleRecipe:
    """What one linear or embedding gets."""

    weights: WeightSpec
    activations: ActivationSpec
    observer: AnyObserver


def resolve_weights(sections: Sequence[Weights]) -> WeightSpec:
    """Lay ``sections`` over each other, later ones over earlier ones, field by field.

    A size goes with its granularity: one that names another granularity drops the earlier size.
    Raises InvalidArgumentError for a size without its granularity, or the reverse.
    """
    asked: dict[str, Any] = {}
    for section in sections:
        given = section.model_dump(exclude_none=True)
        if "granularity" in given:
            for size in _SIZES.values():
                asked.pop(size, None)
        asked |= given
    sizes = {size: asked.pop(size) for size in _SIZES.values() if size in asked}
    granularity = asked.get("granularity", "group")
    wanted = _SIZES.get(granularity)
    for size, value in sizes.items():
        if size != wanted:
            needed = next(name for name, own in _SIZES.items() if own == size)
            raise InvalidArgumentError(
                f"got {size}={value} with granularity={granularity}, accepted is "
                f"granularity={needed}"
            )
    bits = asked.pop("bits", 4)
    return WeightSpec(
        bits=None if bits == "none" else bits,
        group_size=None if wanted is None else sizes.get(wanted, 32),
        **asked,
    )


def resolve_activations(sections: Sequence[Activations]) -> ActivationSpec:
    """Lay ``sections`` over each other; a dynamic range is taken of each token unless said."""
    asked: dict[str, Any] = {}
    for section in sections:
        asked |= section.model_dump(exclude_none=True)
    if asked.get("kind") == "dynamic":
        asked.setdefault("granularity", "token")
    return ActivationSpec(**asked)
