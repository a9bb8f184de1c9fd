"""The recipes that have a name, and the names that ExecuTorch has for them."""

from __future__ import annotations

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_section import suggest
from edgepass.calibration.recipe_sections import Activations, KvCache, Weights
from edgepass.ops.errors import InvalidArgumentError

_GROUPS = {4: Weights(bits=4, group_size=32), 8: Weights(bits=8, granularity="channel")}
_DYNAMIC, _FLOAT = Activations(kind="dynamic"), Activations()


def _host(name: str, activations: Activations) -> Recipe:
    return Recipe(name=name, weights=_GROUPS[int(name[-2])], activations=activations)


def _qnn(name: str, activation_bits: int | None, weight_bits: int, kv_bits: int | None) -> Recipe:
    sizes: dict[str, object] = {"granularity": "channel"}
    if name.endswith("_block"):
        sizes = {"granularity": "block", "block_size": 32}
    weights = Weights.model_validate({"bits": weight_bits, **sizes})
    activations = Activations()
    if activation_bits is not None:
        activations = Activations.model_validate({"kind": "static", "bits": activation_bits})
    return Recipe(
        name=name,
        backend="qnn",
        weights=weights,
        activations=activations,
        embedding=Weights(bits="none"),
        kv_cache=KvCache(bits="none" if kv_bits is None else kv_bits),
    )


_UNTRAINED = (
    _host("8da4w", _DYNAMIC),
    _host("8da8w", _DYNAMIC),
    _host("4w", _FLOAT),
    _host("8w", _FLOAT),
    _qnn("8a8w", 8, 8, kv_bits=8),
    _qnn("8a4w", 8, 4, kv_bits=8),
    _qnn("16a16w", 16, 16, kv_bits=8),
    _qnn("16a8w", 16, 8, kv_bits=8),
    _qnn("16a4w", 16, 4, kv_bits=8),
    _qnn("16a4w_block", 16, 4, kv_bits=8),
    _qnn("fp16a8w", None, 8, kv_bits=None),
)
# The stock quantizer has no training for the others (tests/lowering/test_qnn_training.py).
_TRAINABLE = (
    *("8da4w", "8da8w", "4w", "8w"),
    *("8a8w", "16a8w", "16a4w", "fp16a8w"),
)
PRESETS = {
    recipe.name: recipe
    for recipe in (
        *_UNTRAINED,
        *(
            each.changed(name=f"{each.name}_qat", qat=True)
            for each in _UNTRAINED
            if each.name in _TRAINABLE
        ),
    )
}

# ExecuTorch's --pt2e_quantize leaves the embedding float.
_NO_TABLE = Weights(bits="none")
ALIASES = {
    "xnnpack_dynamic": PRESETS["8da8w"].changed(backend="xnnpack", embedding=_NO_TABLE),
    "xnnpack_dynamic_qc4": PRESETS["8da4w"].changed(
        backend="xnnpack",
        embedding=_NO_TABLE,
        weights=Weights(bits=4, granularity="channel"),
    ),
    "vulkan_8w": PRESETS["8w"].changed(backend="vulkan", embedding=_NO_TABLE),
    **{f"qnn_{name}": PRESETS[name] for name in ("8a8w", "16a16w", "16a4w", "16a4w_block")},
}
# What the same table has for backends that edgepass does not lower for.
_FOREIGN = {
    "openvino": "OpenVINO",
    "coreml": "Core ML",
    "tosa": "TOSA",
    "ethosu": "Ethos-U",
    "vgf": "VGF",
}


def find_preset(name: str) -> Recipe:
    """The recipe of that name or alias.

    Raises InvalidArgumentError, naming the nearest one and all that there are.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in ALIASES:
        return ALIASES[name].changed(name=name)
    owner = _FOREIGN.get(name.partition("_")[0])
    if owner is not None:
        raise InvalidArgumentError(
            f"got recipe={name!r}, which is for {owner}; accepted are recipes for xnnpack, vulkan "
            f"and qnn: {', '.join(PRESETS)}"
        )
    raise InvalidArgumentError(f"unknown recipe: got recipe={name!r}{suggest(name, PRESETS)}")
