"""A ``transformers`` decoder taken layer by layer: what goes into each, and running one alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.ops.errors import CalibrationError


@dataclass(frozen=True)
class DecoderLayer:
    """One layer, its path, and the arguments besides the hidden states that the model gives it."""

    path: str
    module: nn.Module
    arguments: dict[str, Any]

    def run(self, hidden: Tensor) -> Tensor:
        """The layer's output for hidden states ``[1, T, D]``."""
        out = self.module(hidden, **self.arguments)
        return out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    """Ends a forward pass where its rest is not wanted."""


def find_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder's layers with their paths, in order.

    Raises CalibrationError if there is no list of as many modules as the config has layers.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{path}.{i}", layer) for i, layer in enumerate(module)]
    raise CalibrationError(
        f"no decoder layers: got model={type(model).__name__}, accepted are transformers' causal "
        "language models with one list of layers"
    )


@torch.no_grad()
def observe_layers(model: Any, chunk: Tensor) -> list[DecoderLayer]:
    """Run ``model`` on one chunk ``[T]`` and note what each layer is given besides its input."""
    arguments: dict[str, dict[str, Any]] = {}
    layers = find_layers(model)

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 1:
                raise CalibrationError(
                    f"unknown call: got {path} with {len(args)} positional arguments, accepted "
                    "are layers that take their hidden states and keywords"
                )
            arguments[path] = dict(kwargs)

        return hook

    hooks = [m.register_forward_pre_hook(note(path), with_kwargs=True) for path, m in layers]
    try:
        model(chunk[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [DecoderLayer(path, module, arguments[path]) for path, module in layers]


def first_hidden_states(model: Any, chunks: Tensor) -> list[Tensor]:
    """What the first layer is given for each of ``chunks`` ``[C, T]``: ``[1, T, D]`` each."""
    return list(_inputs_of(find_layers(model)[0][1], model, chunks))


def final_hidden_states(model: Any, chunks: Tensor) -> Iterator[Tensor]:
    """What the head is given for each of ``chunks`` ``[C, T]``: ``[1, T, D]`` each."""
    return _inputs_of(model.get_output_embeddings(), model, chunks)


@torch.no_grad()
def _inputs_of(module: nn.Module, model: Any, chunks: Tensor) -> Iterator[Tensor]:
    """The first argument of ``module`` for each chunk; the model runs no further."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        for chunk in chunks:
            try:
                model(chunk[None], use_cache=False)
            except _Stop:
                yield found.pop()
    finally:
        handle.remove()
