"""The public functions: one call from a model, or an exported program, to a ``.pte``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgepass.calibration.recipe import Recipe
from edgepass.calibration.recipe_file import AnyRecipe
from edgepass.calibration.recipe_modules import plan_modules
from edgepass.calibration.recipes import check_training, find_recipe, quantize_model
from edgepass.calibration.training import Train
from edgepass.device_check import add_device_check, decoder_samples
from edgepass.lowering.explain import explain_for_backend
from edgepass.lowering.lower import BACKENDS, DTYPES, LoweredProgram, check_choice
from edgepass.lowering.lower import lower as lower_program
from edgepass.lowering.recipe_legality import check_legality, check_modules
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.models.load import load_blocks, load_model
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram

__all__ = [
    "check_options",
    "choose_recipe",
    "explain",
    "export_quantized",
    "load_blocks",
    "load_model",
    "lower",
    "short_context",
]


# 4-bit weights by the path of their module: integers, scales, zero points or None.
Blocks = Mapping[str, tuple[Tensor, Tensor, Tensor | None]]


def check_options(
    backend: str,
    recipe: AnyRecipe,
    dtype: str,
    group_size: int | None = None,
    weight_algorithm: str | None = None,
) -> Recipe:
    """Return the recipe that is meant.

    Raises InvalidArgumentError for an unknown name or a recipe that ``backend`` cannot hold,
    before any work is done.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("dtype", dtype, DTYPES)
    chosen = choose_recipe(recipe, group_size, weight_algorithm)
    check_training(chosen, None)
    check_legality(chosen, backend)
    return chosen


def choose_recipe(
    recipe: AnyRecipe, group_size: int | None = None, weight_algorithm: str | None = None
) -> Recipe:
    """The recipe of that name or file, with another group size or algorithm if one is given."""
    chosen = find_recipe(recipe)
    if group_size is not None:
        chosen = chosen.with_group_size(group_size)
    return chosen if weight_algorithm is None else chosen.with_algorithm(weight_algorithm)


def check_blocks(blocks: Blocks | None, backend: str) -> None:
    """Refuse blocks with offsets on a backend whose int4 kernel is symmetric.

    Raises InvalidArgumentError.
    """
    offset = [name for name, (_, _, zero) in (blocks or {}).items() if zero is not None]
    if offset and backend == "xnnpack":
        raise InvalidArgumentError(
            f"got blocks with offsets (Q4_1) for {offset[0]} on backend=xnnpack, whose int4 kernel "
            "is symmetric; accepted are backend=vulkan, Q4_0 files, or a recipe without the blocks"
        )


def short_context(model: Any) -> int:
    """A context that is quick to export with: what is fused does not depend on it."""
    return min(128, int(getattr(model.config, "max_position_embeddings", None) or 128))


def lower(
    model: nn.Module | ExportedProgram,
    *,
    backend: str,
    recipe: AnyRecipe = "8da4w",
    group_size: int | None = None,
    context: int = 1024,
    check: bool = False,
    train: Train | None = None,
    chunks: Tensor | None = None,
    blocks: Blocks | None = None,
    **options: Any,
) -> LoweredProgram:
    """Lower a ``transformers`` causal language model, or any exported program.

    An ExportedProgram is taken as it is (``recipe``, ``group_size`` and ``context`` do not apply).
    A model is quantized in place by ``recipe`` (a preset's name, a recipe file's path or a Recipe;
    ``group_size`` takes the place of its own; ``train`` is for recipes of quantization-aware
    training, as in ``quantize_model``; its weight algorithm may need ``chunks`` to calibrate on,
    token ids int64 ``[C, T]``; ``blocks``, of ``load_blocks``, are 4-bit weights of a GGUF file,
    taken as they are), given a KV cache of ``context`` tokens and exported.
    ``check`` runs the finished program on the host and reports how near it comes to the eager fused
    program and to the unquantized model (``report["numerics"]``): on ``sample_inputs`` if these are
    given, else the program's examples, or a few random tokens. ``options`` are those of
    ``edgepass.lowering.lower.lower``.

    Returns the result with ``.buffer``, ``.report`` and ``.save(folder)``. Raises an
    ``EdgepassError`` that names what is wrong and what would be accepted.
    """
    check_choice("backend", backend, BACKENDS)
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module):
        lowered = lower_program(model, backend=backend, **options)
        if check:
            samples = options.get("sample_inputs")
            add_device_check(lowered, _examples(model) if samples is None else samples)
        return lowered
    chosen = choose_recipe(recipe, group_size)
    plan_modules(model, chosen)
    check_training(chosen, train)
    check_modules(chosen, model, backend)
    check_blocks(blocks, backend)
    samples, unquantized = _decoder_check(model, context, options) if check else ((), None)
    progress = options.get("progress")
    program = export_quantized(model, chosen, context, chunks, progress, blocks, train)
    config: Any = model.config
    facts = {
        "group_size": chosen.for_module("").weights.group_size,
        "quantization": chosen.asked(),
        "context": context,
        "vocabulary": int(config.vocab_size),
        "layers": int(config.num_hidden_layers),
        "end_tokens": _end_tokens(model),
    }
    lowered = lower_program(program, backend=backend, recipe=chosen.name, facts=facts, **options)
    if check:
        add_device_check(lowered, samples, unquantized)
    return lowered


def _examples(program: Any) -> Sequence[Any]:
    args, kwargs = getattr(program, "example_inputs", None) or ((), {})
    return (*args, *kwargs.values())


def _decoder_check(
    model: Any, context: int, options: dict[str, Any]
) -> tuple[Sequence[Any], list[Tensor]]:
    """Sample inputs, and what the model gives for them before it is quantized."""
    samples = options.get("sample_inputs")
    if samples is None:
        samples = decoder_samples(int(model.config.vocab_size), context)
    with torch.no_grad():
        return samples, [StaticCacheDecoder(model, context)(*samples)]


def _end_tokens(model: Any) -> list[int]:
    """The token ids that end a text, which for chat models are more than the tokenizer's one."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def export_quantized(
    model: nn.Module,
    recipe: AnyRecipe,
    context: int,
    chunks: Tensor | None = None,
    progress: Callable[..., None] | None = None,
    blocks: Blocks | None = None,
    train: Train | None = None,
) -> ExportedProgram:
    """Quantize ``model`` in place and export it as a decoder with a static cache."""
    chosen = find_recipe(recipe)
    decoder = StaticCacheDecoder(model, context)
    on_layer = None if progress is None else partial(progress, "quantize layer")
    options: dict[str, Any] = {"chunks": chunks, "on_layer": on_layer, "blocks": blocks}
    quantize_model(model, chosen, train=train, **options)
    return export_decoder(decoder)


def explain(program: ExportedProgram, backend: str) -> list[dict[str, Any]]:
    """For each linear of ``program`` what ``backend`` makes of it, without lowering.

    A row has its ``name``, whether it is ``fused``, ``how`` it is computed, else the first
    ``reason`` why not and the ``node`` that decides it.
    """
    check_choice("backend", backend, BACKENDS)
    working = WorkingProgram(program)
    fusion_pipeline(int8_weights=backend == "xnnpack").apply(working)
    return explain_for_backend(working, backend)
