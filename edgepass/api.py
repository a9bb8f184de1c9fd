"""The public functions: one call from a model, or an exported program, to a ``.pte``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram

from edgepass.calibration.recipes import find_recipe, quantize_model
from edgepass.lowering.explain import explain_for_backend
from edgepass.lowering.lower import BACKENDS, DTYPES, LoweredProgram, check_choice
from edgepass.lowering.lower import lower as lower_program
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.models.load import load_model
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram

__all__ = ["check_options", "explain", "export_quantized", "load_model", "lower", "short_context"]


def check_options(backend: str, recipe: str, dtype: str) -> None:
    """Raise InvalidArgumentError for an unknown name, before any work is done."""
    check_choice("backend", backend, BACKENDS)
    check_choice("dtype", dtype, DTYPES)
    find_recipe(recipe)


def short_context(model: Any) -> int:
    """A context that is quick to export with: what is fused does not depend on it."""
    return min(128, int(getattr(model.config, "max_position_embeddings", None) or 128))


def lower(
    model: nn.Module | ExportedProgram,
    *,
    backend: str,
    recipe: str = "8da4w",
    group_size: int = 32,
    context: int = 1024,
    **options: Any,
) -> LoweredProgram:
    """Lower a ``transformers`` causal language model, or any exported program.

    An ExportedProgram is taken as it is (``recipe``, ``group_size`` and ``context`` do not apply).
    A model is quantized in place by ``recipe``, given a KV cache of ``context`` tokens and
    exported. ``options`` are those of ``edgepass.lowering.lower.lower``.

    Returns the result with ``.buffer``, ``.report`` and ``.save(folder)``. Raises an
    ``EdgepassError`` that names what is wrong and what would be accepted.
    """
    check_choice("backend", backend, BACKENDS)
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module):
        return lower_program(model, backend=backend, **options)
    program = export_quantized(model, recipe, group_size, context)
    config: Any = model.config
    facts = {
        "group_size": group_size,
        "context": context,
        "vocabulary": int(config.vocab_size),
        "layers": int(config.num_hidden_layers),
        "end_tokens": _end_tokens(model),
    }
    return lower_program(program, backend=backend, recipe=recipe, facts=facts, **options)


def _end_tokens(model: Any) -> list[int]:
    """The token ids that end a text, which for chat models are more than the tokenizer's one."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def export_quantized(
    model: nn.Module, recipe: str, group_size: int, context: int
) -> ExportedProgram:
    """Quantize ``model`` in place and export it as a decoder with a static cache."""
    find_recipe(recipe)
    decoder = StaticCacheDecoder(model, context)
    quantize_model(model, recipe, group_size)
    return export_decoder(decoder)


def explain(program: ExportedProgram, backend: str) -> list[dict[str, Any]]:
    """For each linear of ``program`` what ``backend`` makes of it, without lowering.

    A row has its ``name``, whether it is ``fused``, ``how`` it is computed, else the first
    ``reason`` why not and the ``node`` that decides it.
    """
    check_choice("backend", backend, BACKENDS)
    working = WorkingProgram(program)
    fusion_pipeline().apply(working)
    return explain_for_backend(working, backend)
