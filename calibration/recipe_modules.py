"""Which modules of a model a recipe speaks of, and what each of them gets."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torchao.utils import TorchAOBaseTensor

from edgepass.calibration.recipe import Recipe, Role
from edgepass.calibration.recipe_resolution import ModuleRecipe, WeightSpec
from edgepass.calibration.recipe_section import suggest
from edgepass.ops.errors import InvalidArgumentError


def quantized_sites(model: nn.Module) -> dict[str, Role]:
    """The path of each linear and embedding of ``model``, with the part that it plays.

    The head is what the model itself calls its output embeddings, or a linear called ``lm_head``.
    """
    head = _head(model)
    roles: dict[str, Role] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            roles[name] = "embedding"
        elif isinstance(module, nn.Linear):
            is_head = module is head if head is not None else name.split(".")[-1] == "lm_head"
            roles[name] = "head" if is_head else "linear"
    return roles


def plan_modules(model: nn.Module, recipe: Recipe) -> dict[str, ModuleRecipe]:
    """What each linear and embedding of ``model`` gets by ``recipe``, by its path.

    Raises InvalidArgumentError for a pattern that matches no module, overrides that ask a module
    for two things where the last is not the narrowest, a group that does not divide a row, or a
    weight that is quantized already.
    """
    sites = quantized_sites(model)
    check_patterns(recipe, sites)
    planned = {name: recipe.for_module(name, role) for name, role in sites.items()}
    for name, module in model.named_modules():
        if name in planned:
            _check_weight(name, module, planned[name].weights)
    return planned


def check_patterns(recipe: Recipe, sites: Mapping[str, Role]) -> None:
    """Refuse patterns that match none of ``sites``, and overrides that contradict each other.

    Of two overrides that ask one module for different values of one field, the later must match
    fewer modules, all of which the earlier matches. Raises InvalidArgumentError.
    """
    matched = []
    for place, override in enumerate(recipe.overrides):
        found = {name for name in sites if fnmatchcase(name, override.modules)}
        if not found:
            raise InvalidArgumentError(
                f"recipe={recipe.name}: got overrides.{place}.modules={override.modules!r}, which "
                f"matches no linear or embedding{suggest(override.modules, _examples(sites))}"
            )
        matched.append(found)
    for name in sites:
        setters: dict[str, list[tuple[int, Any]]] = {}
        for place, override in enumerate(recipe.overrides):
            if name in matched[place]:
                for field, value in _fields(override.model_dump(exclude_none=True)).items():
                    setters.setdefault(field, []).append((place, value))
        for field, asked in setters.items():
            *earlier, (last, value) = asked
            for place, other in earlier:
                if other != value and not matched[last] < matched[place]:
                    raise InvalidArgumentError(
                        f"recipe={recipe.name}: got {field} for {name} twice, {other} by overrides."
                        f"{place} ({recipe.overrides[place].modules}) and {value} by overrides."
                        f"{last} ({recipe.overrides[last].modules}); accepted is a last pattern "
                        "that matches a part of what the others match"
                    )


def _fields(asked: dict[str, Any]) -> dict[str, Any]:
    """Each value that an override asks for, by the path of its key."""
    flat = {"observer": asked["observer"]} if "observer" in asked else {}
    for section in ("weights", "activations"):
        flat |= {f"{section}.{key}": value for key, value in asked.get(section, {}).items()}
    return flat


def _examples(sites: Mapping[str, Role]) -> list[str]:
    """A few paths to name in an error: of each last part, the first."""
    by_end = {name.split(".")[-1]: name for name in reversed(list(sites))}
    return list(reversed(by_end.values()))


def _check_weight(name: str, module: Any, spec: WeightSpec) -> None:
    if isinstance(module.weight, TorchAOBaseTensor):
        raise InvalidArgumentError(
            f"already quantized: got {name} with a {type(module.weight).__name__}, "
            "accepted are models with float weights (or export the model yourself)"
        )
    width = module.weight.shape[1]
    if spec.bits is not None and spec.group_size is not None and width % spec.group_size:
        size = f"{spec.granularity}_size"
        raise InvalidArgumentError(
            f"got {size}={spec.group_size}, which does not divide the {width} columns of "
            f"{name}; accepted are divisors of {width} from 2 on, such as 32"
        )


def _head(model: Any) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None
