"""A small copy of a model's forward that is quick to time: its own linears and its attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.ops.errors import InvalidArgumentError

# Rows of a weight (a vocabulary's have more) and of attention beyond which time is in proportion.
_MOST_OUTPUTS, _MOST_ATTENTION_ROWS = 8192, 128
# Floats that keep one thread busy for long enough that all are woken.
_WAKE_UP = 1 << 16


@dataclass(frozen=True)
class LinearShape:
    """The ``modules`` (one and more) of ``inputs`` to ``outputs`` features in one dtype."""

    inputs: int
    outputs: int
    modules: tuple[nn.Linear, ...]


@dataclass(frozen=True)
class AttentionShape:
    """Attention of ``layers`` layers: ``heads`` of ``width``."""

    layers: int
    heads: int
    width: int


class ModelShapes:
    """What a forward of ``model`` computes: ``linears`` by shape, and ``attention`` or None.

    Raises InvalidArgumentError for a model without an ``nn.Linear``.
    """

    def __init__(self, model: nn.Module) -> None:
        groups: dict[Any, list[nn.Linear]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                groups.setdefault((*weight.shape, weight.dtype), []).append(module)
        if not groups:
            raise InvalidArgumentError(
                f"no linears to time: got model={type(model).__name__} with 0 modules of "
                "torch.nn.Linear, accepted are 1 and more"
            )
        self.linears = [
            LinearShape(inputs, outputs, tuple(modules))
            for (outputs, inputs, _), modules in groups.items()
        ]
        self.attention = _attention_shape(getattr(model, "config", None))

    def flops(self, tokens: int) -> int:
        """Floating point operations of one forward of ``tokens`` tokens."""
        weights = sum(each.inputs * each.outputs * len(each.modules) for each in self.linears)
        form = self.attention
        scores = form.layers * form.heads * form.width * tokens if form else 0
        return 2 * tokens * (weights + 2 * scores)


def _attention_shape(config: Any) -> AttentionShape | None:
    names = "num_hidden_layers", "num_attention_heads", "hidden_size"
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    layers, heads, hidden = sizes
    return AttentionShape(layers, heads, getattr(config, "head_dim", None) or hidden // heads)


@dataclass(frozen=True)
class _Part:
    """One operation: ``run(turn)`` of ``flops`` operations, which a forward repeats ``times``."""

    run: Callable[[int], Tensor]
    flops: int
    times: float


class Probe:
    """Times one linear of each shape, and one layer's attention, in place of a whole forward.

    ``rows`` tokens stand for the ``tokens`` of a forward behind ``past`` cached ones; one pass has
    ``flops`` floating point operations. Each pass takes the weights of the next layer, so that they
    come from memory as they do in a forward, and the modules' own weights, so that none are copied.
    """

    def __init__(self, shapes: ModelShapes, tokens: int, rows: int, past: int = 0) -> None:
        self.parts = [_linear(shape, tokens, rows) for shape in shapes.linears]
        if shapes.attention is not None:
            few = min(rows, _MOST_ATTENTION_ROWS)
            self.parts.append(_attention(shapes.attention, tokens, few, past))
        self.flops = sum(part.flops for part in self.parts)
        self.turn = 0

    def __call__(self, threads: int) -> float:
        """Return the seconds that a forward would take with ``threads`` threads, by one pass.

        Leaves torch's thread count at ``threads``.
        """
        torch.set_num_threads(threads)
        torch.zeros(threads * _WAKE_UP)
        self.turn += 1
        with torch.no_grad():
            return sum(part.times * _time(part.run, self.turn) for part in self.parts)


def _time(run: Callable[[int], Tensor], turn: int) -> float:
    began = time.perf_counter()
    run(turn)
    return time.perf_counter() - began


def _linear(shape: LinearShape, tokens: int, rows: int) -> _Part:
    outputs, modules = min(shape.outputs, _MOST_OUTPUTS), shape.modules
    x = torch.full((rows, shape.inputs), 0.5, dtype=modules[0].weight.dtype)

    def run(turn: int) -> Tensor:
        first = turn * outputs % (shape.outputs - outputs + 1)
        weight = modules[turn % len(modules)].weight[first : first + outputs]
        return nn.functional.linear(x, weight)

    repeats = len(modules) * shape.outputs / outputs * tokens / rows
    return _Part(run, 2 * rows * shape.inputs * outputs, repeats)


def _attention(shape: AttentionShape, tokens: int, rows: int, past: int) -> _Part:
    query = torch.full((shape.heads, rows, shape.width), 0.5)
    keys = torch.full((shape.heads, tokens + past, shape.width), 0.5)

    def run(turn: int) -> Tensor:
        return (query @ keys.transpose(1, 2)).softmax(-1) @ keys

    return _Part(run, 4 * rows * keys.numel(), shape.layers * tokens / rows)
