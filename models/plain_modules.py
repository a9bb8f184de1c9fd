"""Modules of a decoder in forms that a quantizer for HTP takes whole.

Rotary embeddings computed from positions (products of large integers, then sines) lose everything
in 8 or 16 bits, so they become rows of tables. RMSNorm spelled out becomes one ``rms_norm``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A norm is only replaced when both forms agree to this relative error in float32.
_EQUAL = 1e-5


class RotaryTables(nn.Module):
    """The cosines and sines of one rotary module for positions 0 to ``context - 1``.

    ``tables`` are float ``[context, D]``, one pair for each set of extra arguments that the model
    passes (Gemma 3 has one a layer type).
    """

    def __init__(self, rotary: Any, context: int, kinds: list[tuple[Any, ...]], like: Tensor):
        super().__init__()
        positions = torch.arange(context)[None]
        for index, kind in enumerate(kinds):
            for name, table in zip(("cos", "sin"), rotary(like, positions, *kind), strict=True):
                self.register_buffer(f"{name}_{index}", table[0].clone(), persistent=False)
        self.kinds = {kind: index for index, kind in enumerate(kinds)}

    def rows(self, position_ids: Tensor, kind: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[1, S, D]`` of ``position_ids`` (integers ``[1, S]``)."""
        index = self.kinds[kind]
        return getattr(self, f"cos_{index}")[position_ids], getattr(self, f"sin_{index}")[
            position_ids
        ]


def rotary_tables(model: nn.Module, context: int) -> nn.ModuleDict:
    """Tables for each rotary module of ``model``, keyed by its path with ``/`` for ``.``."""
    kinds = [(kind,) for kind in sorted(set(getattr(model.config, "layer_types", None) or ()))]
    like = torch.zeros(1, dtype=next(model.parameters()).dtype)
    return nn.ModuleDict(
        {
            name.replace(".", "/"): RotaryTables(
                module, context, kinds if _takes_layer_type(module) else [()], like
            )
            for name, module in model.named_modules()
            if type(module).__name__.endswith("RotaryEmbedding")
        }
    )


def _takes_layer_type(module: nn.Module) -> bool:
    # The wrapper that transformers puts around `forward` keeps the signature of what it wraps.
    return "layer_type" in inspect.signature(module.forward).parameters


class NormWeights(nn.Module):
    """The weights and epsilons of a model's RMSNorm modules, as ``rms_norm`` takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.epsilons: dict[str, float] = {}
        for name, module in model.named_modules():
            found = _rms_norm_form(module)
            if found is not None:
                key = name.replace(".", "/")
                self.epsilons[key] = found[1]
                self.register_buffer(key, found[0], persistent=False)

    def apply_to(self, key: str, x: Tensor) -> Tensor:
        """Return the norm ``key`` of ``x [..., D]``."""
        weight = self.get_buffer(key)
        return nn.functional.rms_norm(x, (weight.shape[0],), weight, self.epsilons[key])


def _rms_norm_form(module: Any) -> tuple[Tensor, float] | None:
    """Weight ``[D]`` and epsilon such that ``rms_norm`` equals ``module``; None if none do."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "weight"):
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None:
        return None
    width = module.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, width, generator=generator, dtype=module.weight.dtype)
    with torch.no_grad():
        # A norm without its weight, so the quotient is the weight whatever its convention.
        bare = nn.functional.rms_norm(torch.ones_like(x[:1]), (width,), None, epsilon)
        weight = (module(torch.ones_like(x[:1])) / bare)[0]
        expected = module(x)
        error = nn.functional.rms_norm(x, (width,), weight, epsilon) - expected
    return (weight, float(epsilon)) if error.norm() <= _EQUAL * expected.norm() else None


@contextmanager
def plain_modules(model: nn.Module, tables: nn.ModuleDict, norms: NormWeights) -> Iterator[None]:
    """Let the rotary and norm modules of ``model`` compute from ``tables`` and ``norms``."""
    replaced: dict[str, Callable[..., Any]] = {}
    for key, table in tables.items():
        replaced[key] = _from_table(table)
    for key in norms.epsilons:
        replaced[key] = _from_weight(norms, key)
    modules = {key: model.get_submodule(key.replace("/", ".")) for key in replaced}
    for key, module in modules.items():
        module.__dict__["forward"] = replaced[key]
    try:
        yield
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


def _from_table(table: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(x: Tensor, position_ids: Tensor, layer_type: Any = None) -> tuple[Tensor, Tensor]:
        return table.rows(position_ids, () if layer_type is None else (layer_type,))

    return forward


def _from_weight(norms: NormWeights, key: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return norms.apply_to(key, x)

    return forward
