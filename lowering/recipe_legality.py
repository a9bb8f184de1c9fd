"""Whether a backend can hold a recipe; if not, which part, and the nearest value that it can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_modules import check_patterns, quantized_sites
from edgepass.calibration.recipe_resolution import ModuleRecipe
from edgepass.lowering.recipe_rules import RULES, Part, recipe_parts
from edgepass.ops.errors import InvalidArgumentError

# Where it is asked, what, and which modules it may be for.
Place = tuple[str, ModuleRecipe, tuple[Role, ...]]


def check_legality(recipe: Recipe, backend: str) -> list[str]:
    """Return what ``backend`` computes otherwise than asked, in float, one line a part.

    Raises InvalidArgumentError if the backend cannot hold a part.
    """
    return _judge(recipe, backend, _sections(recipe))


def check_modules(recipe: Recipe, model: nn.Module, backend: str) -> list[str]:
    """The same of what each module of ``model`` gets.

    Raises InvalidArgumentError, for a pattern that matches no module, too.
    """
    sites = quantized_sites(model)
    check_patterns(recipe, sites)
    return _judge(
        recipe,
        backend,
        ((f"{name}.", recipe.for_module(name, role), (role,)) for name, role in sites.items()),
    )


def _judge(recipe: Recipe, backend: str, places: Iterable[Place]) -> list[str]:
    # Each part once, at the first place that asks for it: a model has hundreds.
    found = {part: part for part in recipe_parts(recipe, backend)}
    for place, module, roles in places:
        judged = [list(RULES[backend](module, role)) for role in roles]
        for part in min(judged, key=_weight):
            found.setdefault(part, replace(part, place=place))
    illegal = [str(part) for part in found.values() if not part.as_float]
    if illegal:
        raise InvalidArgumentError(
            f"recipe={recipe.name}, which backend={backend} cannot hold: {'; '.join(illegal)}"
        )
    return list(map(str, found.values()))


def _weight(parts: list[Part]) -> tuple[int, int]:
    return sum(not part.as_float for part in parts), len(parts)


def _sections(recipe: Recipe) -> Iterator[Place]:
    yield "", recipe.for_module(""), ("linear",)
    yield "embedding.", recipe.for_module("", "embedding"), ("embedding",)
    yield "head.", recipe.for_module("", "head"), ("head",)
    for number, override in enumerate(recipe.overrides):
        # Which modules it is for is not known here, so that it may be for an embedding.
        alone = recipe.changed(overrides=(override.changed(modules="*"),))
        yield f"overrides.{number}.", alone.for_module("x"), ("linear", "embedding")
