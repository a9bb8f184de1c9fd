"""What ``edgepass recipes`` does, without its options."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.recipe_presets import ALIASES, PRESETS
from edgepass.calibration.recipe_resolution import ActivationSpec, WeightSpec
from edgepass.calibration.recipe_sections import BACKENDS
from edgepass.lowering.recipe_legality import check_legality, check_modules
from edgepass.ops.errors import InvalidArgumentError


def list_recipes() -> list[dict[str, Any]]:
    """One row for each preset and alias: what it asks for, and which backends hold it."""
    return [_row(find_recipe(name)) for name in (*PRESETS, *ALIASES)]


def check_recipe(
    spec: str, backend: str | None, model: str | None, layers: int | None, trust: bool
) -> dict[str, Any]:
    """Check a recipe against ``backend`` (else its own, else all) and against a model.

    Raises InvalidArgumentError if a part is wrong, if the backend cannot hold it, or if no backend
    can, or if it does not fit the model.
    """
    if backend not in (None, *BACKENDS):
        raise InvalidArgumentError(
            f"unknown backend: got backend={backend!r}, accepted are {', '.join(BACKENDS)}"
        )
    recipe = find_recipe(spec)
    wanted = backend or recipe.backend
    backends = _verdicts(recipe) if wanted is None else {wanted: check_legality(recipe, wanted)}
    result: dict[str, Any] = {"recipe": recipe.name}
    if model is not None:
        result["modules"] = _modules(recipe, wanted, model, layers, trust)
    return result | {"backends": backends}


def _verdicts(recipe: Recipe) -> dict[str, Any]:
    """By backend what it computes in float, or why it cannot hold the recipe."""
    verdicts: dict[str, Any] = {}
    for backend in BACKENDS:
        try:
            verdicts[backend] = check_legality(recipe, backend)
        except InvalidArgumentError as error:
            verdicts[backend] = str(error)
    if all(isinstance(verdict, str) for verdict in verdicts.values()):
        raise InvalidArgumentError(next(iter(verdicts.values())))
    return verdicts


def _modules(
    recipe: Recipe, backend: str | None, model: str, layers: int | None, trust: bool
) -> dict[str, int]:
    """How many modules of the model get each form."""
    from edgepass.calibration.recipe_modules import plan_modules
    from edgepass.models.load import load_model

    loaded, _ = load_model(model, layers=layers, trust_remote_code=trust)
    planned = plan_modules(loaded, recipe)
    if backend is not None:
        check_modules(recipe, loaded, backend)
    forms = (f"{_weights(m.weights)}, {_activations(m.activations)}" for m in planned.values())
    return dict(Counter(forms))


def _row(recipe: Recipe) -> dict[str, Any]:
    module = recipe.for_module("")
    held = []
    for backend in BACKENDS:
        try:
            check_legality(recipe, backend)
        except InvalidArgumentError:
            continue
        held.append(backend)
    return {
        "name": recipe.name,
        "weights": _weights(module.weights),
        "activations": _activations(module.activations),
        "kv_cache": "float" if recipe.kv_bits is None else f"int{recipe.kv_bits}",
        "backends": held,
    }


def _weights(spec: WeightSpec) -> str:
    if spec.bits is None:
        return "float"
    size = "" if spec.group_size is None else f" of {spec.group_size}"
    return f"{spec.mapping} int{spec.bits} by {spec.granularity}{size}"


def _activations(spec: ActivationSpec) -> str:
    return "float" if spec.kind == "none" else f"{spec.kind} int{spec.bits} by {spec.granularity}"
