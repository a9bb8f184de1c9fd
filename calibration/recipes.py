"""Quantizing a model in place by a recipe."""

from __future__ import annotations

from torch import nn

from edgepass.calibration.grids import RoundedWeight
from edgepass.calibration.quantized_weight import check_torchao_form, torchao_weight
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import AnyRecipe, find_recipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipe_resolution import WeightSpec
from edgepass.calibration.training import Train, train_for
from edgepass.calibration.weight_rounding import quantize_weight
from edgepass.ops.errors import InvalidArgumentError

__all__ = ["check_training", "find_recipe", "quantize_model"]


def quantize_model(
    model: nn.Module,
    recipe: AnyRecipe = "8da4w",
    group_size: int | None = None,
    *,
    train: Train | None = None,
) -> nn.Module:
    """Quantize the linears and embeddings of ``model`` in place by ``recipe``, and return it.

    ``recipe`` is the name of a preset, the path of a recipe file, or a Recipe; ``group_size``
    takes the place of the one that it has by default. A head that is tied to the embedding stays
    equal to it, value for value, if both get the same, so that later passes store one table.

    A recipe for quantization-aware training (``8da4w_qat``) needs ``train``: it is called with the
    model, in which the weights and activations are rounded as they will be, and trains it in place.

    Raises InvalidArgumentError for an unknown recipe, one that needs another flow (static
    activations), or one that does not fit the model; the model is then as it was.
    """
    chosen = find_recipe(recipe)
    if group_size is not None:
        chosen = chosen.with_group_size(group_size)
    planned = plan_modules(model, chosen)
    for name, each in planned.items():
        check_torchao_form(name, each)
    check_training(chosen, train)
    if train is not None:
        train_for(model, planned, train)
    rounded: dict[tuple[int, tuple[int, ...], WeightSpec], RoundedWeight] = {}
    for name, each in planned.items():
        module: nn.Linear | nn.Embedding = model.get_submodule(name)  # type: ignore[assignment]
        weight = module.weight.detach()
        if each.weights.bits is None:
            continue
        # A tied weight is rounded once for all that ask the same of it.
        key = (weight.data_ptr(), tuple(weight.shape), each.weights)
        if key not in rounded:
            rounded[key] = quantize_weight(weight, each.weights)  # type: ignore[arg-type]
        module.weight = torchao_weight(rounded[key], each, weight.dtype)
    return model


def check_training(recipe: Recipe, train: object) -> None:
    """Raise InvalidArgumentError unless ``train`` and a recipe for training go together."""
    if recipe.qat and train is None:
        untrained = recipe.name.removesuffix("_qat")
        raise InvalidArgumentError(
            f"got recipe={recipe.name} without train=, accepted is a function of yours that trains "
            f"the model given to edgepass.quantize_model or edgepass.lower, or recipe={untrained}"
        )
    if train is not None and not recipe.qat:
        raise InvalidArgumentError(
            f"got train= with recipe={recipe.name}, accepted are recipes with qat: true, such as "
            "8da4w_qat"
        )
