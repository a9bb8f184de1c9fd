"""The sections of a recipe: what is asked for. A field that is not given is None.

What a module gets from them is resolved in ``edgepass.calibration.recipe_resolution``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from edgepass.calibration.recipe_observers import Observer
from edgepass.calibration.recipe_section import Section

Backend = Literal["xnnpack", "vulkan", "qnn"]
BACKENDS: tuple[Backend, ...] = ("xnnpack", "vulkan", "qnn")
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
CACHE_BITS = (8, 16)


def _bits_among(accepted: tuple[int, ...]) -> PlainValidator:
    def check(value: Any) -> Any:
        # A boolean is an integer to Python, not to whoever wrote it.
        if value in ("none", None) or (type(value) is int and value in accepted):
            return value
        raise ValueError(f"accepted are {', '.join(map(str, accepted))} or none")

    return PlainValidator(check)


class Weights(Section):
    """How a weight ``[N, K]`` is stored.

    ``bits``: 2 to 8, 16, or ``none`` for a weight that stays float. ``granularity``: what shares a
    scale: the ``tensor``, a ``channel`` (row), a ``group`` of ``group_size`` columns of a row, or a
    ``block`` of ``block_size`` columns whose scale is four bits times a scale of the channel
    (LPBQ). ``mapping``: ``symmetric``, ``asymmetric`` (an integer zero point), or ``float_offset``
    (value = scale * q + offset). ``algorithm``: how the integers are found.
    """

    bits: Annotated[int | Literal["none"] | None, _bits_among(WEIGHT_BITS)] = None
    granularity: Literal["tensor", "channel", "group", "block"] | None = None
    group_size: Annotated[int, Field(ge=2)] | None = None
    block_size: Annotated[int, Field(ge=2)] | None = None
    mapping: Literal["symmetric", "asymmetric", "float_offset"] | None = None
    algorithm: Literal["rtn", "hqq", "mse", "seqmse", "gptq"] | None = None


class Activations(Section):
    """How the input of a linear is quantized.

    ``kind``: ``dynamic`` (its range is taken as the model runs), ``static`` (calibrated before), or
    ``none``. ``granularity``: one scale a ``tensor`` or a ``token``. ``bits``: 8 or 16.
    """

    kind: Literal["dynamic", "static", "none"] | None = None
    bits: Literal[8, 16] | None = None
    granularity: Literal["tensor", "token"] | None = None
    mapping: Literal["symmetric", "asymmetric"] | None = None


class KvCache(Section):
    """What keys and values are stored in: ``bits`` 8 or 16, or ``none`` for float."""

    bits: Annotated[int | Literal["none"] | None, _bits_among(CACHE_BITS)] = None


class Head(Section):
    """What the output head gets instead of the defaults."""

    weights: Weights = Weights()
    activations: Activations = Activations()
    observer: Observer | None = None


class Override(Head):
    """What modules get whose path matches ``modules`` as a shell matches (``*`` spans dots)."""

    modules: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _ask_for_something(self) -> Override:
        if not self.model_dump(exclude={"modules"}, exclude_defaults=True):
            raise ValueError("asks for nothing, accepted are weights, activations and observer")
        return self
