"""One weight of a module, rounded and in torchao's form, as its recipe says."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgepass.calibration.grids import RoundedWeight
from edgepass.calibration.recipe_resolution import ActivationSpec, ModuleRecipe
from edgepass.calibration.weight_rounding import ALGORITHMS
from edgepass.ops.errors import InvalidArgumentError

_DYNAMIC = "int8_asym_per_token"


def torchao_weight(
    rounded: RoundedWeight, module: ModuleRecipe, dtype: torch.dtype
) -> nn.Parameter:
    """``rounded`` as torchao's tensor ``[N, K]``, which dequantizes to ``dtype``.

    Integers of up to 8 bits are stored as int8. With dynamic activations the tensor's linear
    quantizes its input to int8, a scale and zero point a token.
    """
    values, scale, zero = rounded
    if zero is None:
        zero = torch.zeros(scale.shape, dtype=torch.int8)
    tensor = IntxUnpackedToInt8Tensor(
        qdata=values,
        scale=scale.to(dtype),
        zero_point=zero,
        target_dtype=getattr(torch, f"int{module.weights.bits}"),
        block_size=(1, values.shape[1] // scale.shape[1]),
        dtype=dtype,
        activation_quantization=_DYNAMIC if module.activations.kind == "dynamic" else None,
    )
    return nn.Parameter(tensor, requires_grad=False)


def check_torchao_form(name: str, module: ModuleRecipe) -> None:
    """Raise InvalidArgumentError unless torchao's integer tensors can hold what ``name`` gets."""
    weights, activations = module.weights, module.activations
    if weights.bits is None:
        return
    _require(name, "weights.bits", weights.bits, range(2, 9))
    _require(name, "weights.granularity", weights.granularity, ("group", "channel"))
    _require(name, "weights.algorithm", weights.algorithm, ALGORITHMS)
    _require(name, "activations.kind", activations.kind, ("dynamic", "none"))
    if activations.kind == "dynamic":
        held = ActivationSpec("dynamic", 8, "token", "asymmetric")
        for field in ("bits", "granularity", "mapping"):
            accepted = (getattr(held, field),)
            _require(name, f"activations.{field}", getattr(activations, field), accepted)


def _require(name: str, key: str, value: object, accepted: range | tuple[object, ...]) -> None:
    if value not in accepted:
        raise InvalidArgumentError(
            f"got {key}={value} for {name}, which torchao's integer weights do not have; accepted "
            f"are {', '.join(map(str, accepted))}"
        )
