"""What each backend does not hold of a recipe, value by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_resolution import ModuleRecipe

# XNNPACK's int4 kernels read blocks of a multiple of this many columns; its int8 ones have one
# scale a channel.
_XNNPACK_BLOCK = 32
# QNN: weight bits that the stock quantizer has beside the bits of activations (None: fp16).
_QNN_WEIGHT_BITS: dict[int | None, tuple[int, ...]] = {8: (8, 4), 16: (16, 8, 4), None: (8,)}
# Bits of activations and weights that it can train.
_QNN_TRAINED = ((8, 8), (16, 8), (16, 4), (None, 8))
_QNN_CACHE_BITS: dict[int | None, tuple[int | str, ...]] = {
    8: (8,),
    16: (8, 16),
    None: (16, "none"),
}


@dataclass(frozen=True)
class Part:
    """The value of a ``key``, and the ``nearest`` that the backend holds.

    ``place`` is the section or the module, with a dot behind it. ``as_float``: the backend
    computes it right, but in float, so that nothing is gained.
    """

    key: str
    value: object
    nearest: object
    as_float: bool = False
    place: str = ""

    def __str__(self) -> str:
        how = "computed in float, nearest" if self.as_float else "nearest"
        return f"{self.place}{self.key}={self.value} ({how}: {self.nearest})"


def recipe_parts(recipe: Recipe, backend: str) -> Iterator[Part]:
    """What ``backend`` does not hold of what a recipe asks for the whole model."""
    if recipe.backend not in (None, backend):
        yield Part("backend", recipe.backend, backend)
    if recipe.rotation != "none" and backend == "qnn":
        yield Part("rotation", recipe.rotation, "none")
    if recipe.qat and backend == "qnn":
        module = recipe.for_module("")
        pair = (activation_bits(module), module.weights.bits)
        if pair not in _QNN_TRAINED or module.weights.granularity == "block":
            yield Part("qat", True, False)
    bits = recipe.kv_cache.bits
    accepted: tuple[int | str | None, ...] = ("none",)
    if backend == "qnn":
        accepted = _QNN_CACHE_BITS[activation_bits(recipe.for_module(""))]
    if bits is not None and bits not in accepted:
        yield Part("kv_cache.bits", bits, accepted[-1])


def activation_bits(module: ModuleRecipe) -> int | None:
    """The bits of a module's activations, None for float ones."""
    return None if module.activations.kind == "none" else module.activations.bits


def _host_parts(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    """What neither XNNPACK nor Vulkan holds."""
    weights, activations = module.weights, module.activations
    if weights.bits is None:
        return
    if weights.bits == 16:
        yield Part("weights.bits", 16, 8)
    if weights.granularity in ("tensor", "block"):
        nearest = "channel" if weights.granularity == "tensor" else "group"
        yield Part("weights.granularity", weights.granularity, nearest)
    if activations.kind == "static":
        yield Part("activations.kind", "static", "dynamic")
    elif activations.kind == "dynamic":
        wanted = {"bits": 8, "granularity": "token", "mapping": "asymmetric"}
        for field, accepted in wanted.items():
            value = getattr(activations, field)
            if value != accepted:
                yield Part(f"activations.{field}", value, accepted)


def _xnnpack(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    yield from _host_parts(module, role)
    weights = module.weights
    if weights.bits is None or role == "embedding":
        return
    if weights.bits > 4 and weights.granularity != "channel":
        yield Part("weights.granularity", weights.granularity, "channel")
    if weights.mapping != "symmetric":
        yield Part("weights.mapping", weights.mapping, "symmetric")
    if weights.granularity == "group" and weights.group_size and weights.group_size % 32:
        nearest = max(round(weights.group_size / _XNNPACK_BLOCK), 1) * _XNNPACK_BLOCK
        yield Part("weights.group_size", weights.group_size, nearest)
    if module.activations.kind == "none":
        yield Part("activations.kind", "none", "dynamic")


def _vulkan(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    yield from _host_parts(module, role)
    bits = module.weights.bits
    if bits is not None and 4 < bits <= 8:
        yield Part("weights.bits", bits, 4, as_float=True)


def _qnn(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    """What HTP does not hold of a module's recipe."""
    weights, activations = module.weights, module.activations
    if role == "embedding":
        if weights.bits is not None:
            yield Part("weights.bits", weights.bits, "none")
        return
    bits = activation_bits(module)
    accepted = _QNN_WEIGHT_BITS[bits]
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


RULES: dict[str, Callable[[ModuleRecipe, Role], Iterator[Part]]] = {
    "xnnpack": _xnnpack,
    "vulkan": _vulkan,
    "qnn": _qnn,
}
