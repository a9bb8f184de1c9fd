"""Quantizing a model in place by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from edgepass.calibration.grids import RoundedWeight
from edgepass.calibration.quantized_weight import check_torchao_form, torchao_weight
from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import AnyRecipe, find_recipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipe_resolution import ModuleRecipe, WeightSpec
from edgepass.calibration.rotation import rotate
from edgepass.calibration.sequential import round_decoder
from edgepass.calibration.training import Train, train_for
from edgepass.calibration.weight_rounding import NEED_STATISTICS, quantize_weight
from edgepass.ops.errors import InvalidArgumentError

__all__ = ["check_training", "find_recipe", "quantize_model"]


def quantize_model(
    model: nn.Module,
    recipe: AnyRecipe = "8da4w",
    group_size: int | None = None,
    *,
    train: Train | None = None,
    chunks: Tensor | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    blocks: Mapping[str, tuple[Tensor, Tensor, Tensor | None]] | None = None,
) -> nn.Module:
    """Quantize the linears and embeddings of ``model`` in place by ``recipe``, and return it.

    ``recipe`` is the name of a preset, the path of a recipe file, or a Recipe; ``group_size``
    takes the place of the one that it has by default. A head that is tied to the embedding stays
    equal to it, value for value, if both get the same, so that later passes store one table.

    A recipe for quantization-aware training (``8da4w_qat``) needs ``train``: it is called with the
    model, in which the weights and activations are rounded as they will be, and trains it in place.

    ``chunks``, int64 ``[C, T]`` token ids, are what the algorithms ``seqmse`` and ``gptq`` are
    calibrated on, layer by layer; ``on_layer`` is told the layers done and all. ``blocks`` are
    weights that the checkpoint has in 4-bit blocks already, by the path of their module: integers,
    scales and zero points, which are taken as they are.

    Raises InvalidArgumentError for an unknown recipe, one that needs another flow (static
    activations) or calibration, or one that does not fit the model; the model is then as it was.
    Raises CalibrationError for inputs that are not finite.
    """
    chosen = find_recipe(recipe)
    if group_size is not None:
        chosen = chosen.with_group_size(group_size)
    planned = plan_modules(model, chosen)
    for name, each in planned.items():
        check_torchao_form(name, each)
    check_training(chosen, train)
    kept = {name: RoundedWeight(*block) for name, block in (blocks or {}).items()}
    for name in planned.keys() & kept.keys():
        _check_block(name, planned[name], kept[name])
    specs: dict[str, Any] = {
        name: each.weights
        for name, each in planned.items()
        if each.weights.bits is not None and name not in kept
    }
    needing = [name for name, spec in specs.items() if spec.algorithm in NEED_STATISTICS]
    if needing and chunks is None:
        raise InvalidArgumentError(
            f"no calibration text: got algorithm={specs[needing[0]].algorithm} for {needing[0]}, "
            "accepted are calibration tokens with it, or the algorithms rtn, hqq and mse"
        )
    if chosen.rotation == "spinquant":
        if kept:
            raise InvalidArgumentError(
                "got rotation=spinquant with the checkpoint's own blocks, which it would change; "
                "accepted is one of both"
            )
        rotate(model)
    if train is not None:
        train_for(model, planned, train)
    for name, block in kept.items():
        kept_in: Any = model.get_submodule(name)
        kept_in.weight = torchao_weight(block, planned[name], kept_in.weight.dtype)
    planned = {name: each for name, each in planned.items() if name not in kept}
    if needing and chunks is not None:
        for name, fitted in round_decoder(model, specs, chunks, on_layer).items():
            owner: Any = model.get_submodule(name)
            owner.weight = torchao_weight(fitted, planned[name], owner.weight.dtype)
        return model
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


def _check_block(name: str, module: ModuleRecipe, block: RoundedWeight) -> None:
    """Refuse to keep a checkpoint's blocks where the recipe asks for other bits or groups."""
    found = (4, block.values.shape[1] // block.scale.shape[1])
    asked = (module.weights.bits, module.weights.group_size)
    if asked != found:
        raise InvalidArgumentError(
            f"got bits={asked[0]} and group_size={asked[1]} for {name}, whose blocks in the "
            f"checkpoint have {found[0]} and {found[1]}; accepted are the same, or a recipe "
            "without the checkpoint's blocks"
        )
