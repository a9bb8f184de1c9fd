"""Rotary embeddings whose frequencies depend on the length: static within the right context.

``dynamic`` (NTK) changes its frequencies beyond ``max_position_embeddings`` and ``longrope``
beyond ``original_max_position_embeddings``. A decoder whose cache holds no more than that always
sees the first set, so it uses that set and skips the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def rope_types(config: Any) -> list[str]:
    """Return the rotary embedding types of ``config``: one, or one for each type of layer."""
    return [group.get("rope_type", "default") for group in _parameters(config)]


def longest_context(config: Any) -> int | None:
    """Return the most tokens whose rotary frequencies are static; None without a bound."""
    bounds = [getattr(config, "max_position_embeddings", None)]
    bounds += [
        group.get("original_max_position_embeddings")
        for group in _parameters(config)
        if group.get("rope_type") == "longrope"
    ]
    return min((bound for bound in bounds if bound is not None), default=None)


def reset_rotary(model: nn.Module) -> None:
    """Put back the first set of frequencies, which an earlier long text may have replaced."""
    for module in _length_dependent(model):
        for name, buffer in list(module.named_buffers(recurse=False)):
            prefix, found, _ = name.partition("original_inv_freq")
            if found:
                getattr(module, f"{prefix}inv_freq").copy_(buffer)


@contextmanager
def static_rotary(model: nn.Module) -> Iterator[None]:
    """Skip the update of length-dependent frequencies within the block."""
    before = [(module, module.rope_type) for module in _length_dependent(model)]
    for module, rope_type in before:
        nested = isinstance(rope_type, dict)
        module.rope_type = dict.fromkeys(rope_type, "default") if nested else "default"
    try:
        yield
    finally:
        for module, rope_type in before:
            module.rope_type = rope_type


def _length_dependent(model: nn.Module) -> list[Any]:
    def types(module: Any) -> set[Any]:
        kind = getattr(module, "rope_type", None)
        return set(kind.values()) if isinstance(kind, dict) else {kind}

    return [module for module in model.modules() if types(module) & LENGTH_DEPENDENT_ROPE]


def _parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = all(isinstance(value, dict) for value in parameters.values())
    return [group for group in (parameters.values() if nested else [parameters]) if group]
