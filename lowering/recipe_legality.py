"""Whether a backend can hold a recipe; if not, which part, and the nearest value that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.lowering.qnn_recipes import qnn_parts
from edgepass.lowering.recipe_part import Part
from edgepass.ops.errors import InvalidArgumentError

# XNNPACK's int4 kernels read blocks of a multiple of this many columns.
_XNNPACK_BLOCK = 32


def check_legality(
    recipe: Recipe,
    backend: str,
    planned: Mapping[str, ModuleRecipe] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> list[str]:
    """Return what ``backend`` computes otherwise than asked, in float, one line a part.

    ``planned`` and ``roles``: what the modules of a model get; without them the recipe's own
    sections are judged. Raises InvalidArgumentError if the backend cannot hold a part.
    """
    found = list(_recipe_parts(recipe, backend))
    places = _sections(recipe) if planned is None else _modules(planned, roles or {})
    for place, module, accepted_roles in places:
        judged = [list(_RULES[backend](module, role)) for role in accepted_roles]
        found += [replace(part, place=place) for part in min(judged, key=_weight)]
    illegal = list(dict.fromkeys(str(part) for part in found if not part.as_float))
    if illegal:
        raise InvalidArgumentError(
            f"recipe={recipe.name}, which backend={backend} cannot hold: {'; '.join(illegal)}"
        )
    return list(dict.fromkeys(str(part) for part in found))


def _weight(parts: list[Part]) -> tuple[int, int]:
    return sum(not part.as_float for part in parts), len(parts)


Place = tuple[str, ModuleRecipe, tuple[Role, ...]]


def _sections(recipe: Recipe) -> Iterator[Place]:
    yield "", recipe.for_module(""), ("linear",)
    yield "embedding.", recipe.for_module("", "embedding"), ("embedding",)
    yield "head.", recipe.for_module("", "head"), ("head",)
    for number, override in enumerate(recipe.overrides):
        # Which modules it is for is not known here, so that it may be for an embedding.
        alone = recipe.changed(overrides=(override.changed(modules="*"),))
        yield f"overrides.{number}.", alone.for_module("x"), ("linear", "embedding")


def _modules(planned: Mapping[str, ModuleRecipe], roles: Mapping[str, Role]) -> Iterator[Place]:
    for name, module in planned.items():
        yield f"{name}.", module, (roles.get(name, "linear"),)


def _recipe_parts(recipe: Recipe, backend: str) -> Iterator[Part]:
    if recipe.backend not in (None, backend):
        yield Part("backend", recipe.backend, backend)
    if backend != "qnn" and recipe.kv_bits is not None:
        yield Part("kv_cache.bits", recipe.kv_bits, "none")


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
    if weights.mapping == "float_offset":
        yield Part("weights.mapping", "float_offset", "symmetric")
    if activations.kind == "static":
        yield Part("activations.kind", "static", "dynamic")
    elif activations.kind == "dynamic":
        wanted = {"bits": 8, "granularity": "token", "mapping": "asymmetric"}
        for field, nearest in wanted.items():
            value = getattr(activations, field)
            if value != nearest:
                yield Part(f"activations.{field}", value, nearest)


def _xnnpack_parts(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    yield from _host_parts(module, role)
    weights = module.weights
    if weights.bits is None or role == "embedding":
        return
    if weights.bits > 4:
        yield Part("weights.bits", weights.bits, 4)
    if weights.mapping == "asymmetric":
        yield Part("weights.mapping", "asymmetric", "symmetric")
    if weights.granularity == "group" and weights.group_size and weights.group_size % 32:
        nearest = max(round(weights.group_size / _XNNPACK_BLOCK), 1) * _XNNPACK_BLOCK
        yield Part("weights.group_size", weights.group_size, nearest)
    if module.activations.kind == "none":
        yield Part("activations.kind", "none", "dynamic")


def _vulkan_parts(module: ModuleRecipe, role: Role) -> Iterator[Part]:
    yield from _host_parts(module, role)
    bits = module.weights.bits
    if bits is not None and 4 < bits <= 8:
        yield Part("weights.bits", bits, 4, as_float=True)


_RULES: dict[str, Callable[[ModuleRecipe, Role], Iterator[Part]]] = {
    "xnnpack": _xnnpack_parts,
    "vulkan": _vulkan_parts,
    "qnn": qnn_parts,
}
