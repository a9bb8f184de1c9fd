"""Rounding a decoder layer by layer, so that each is fitted to what the rounded ones give it.

Memory holds the model, the hidden states of the calibration chunks and one layer's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgepass.calibration.decoder_layers import (
    DecoderLayer,
    final_hidden_states,
    first_hidden_states,
    observe_layers,
)
from edgepass.calibration.grids import GridSpec, RoundedWeight
from edgepass.calibration.input_statistics import InputStatistics
from edgepass.calibration.layer_inputs import collect_statistics
from edgepass.calibration.weight_rounding import NEED_STATISTICS, quantize_weight

# The head's inputs are taken from so many chunks: a few thousand tokens for some hundred features.
_CHUNKS_FOR_THE_HEAD = 16


def round_decoder(
    model: Any,
    specs: Mapping[str, GridSpec],
    chunks: Tensor,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, RoundedWeight]:
    """Round the weights of ``specs`` (by the paths of their modules) on ``chunks`` ``[C, T]``.

    The embedding goes first, then layer by layer, then the head. A head that is tied to the
    embedding is rounded before all, for the float model's final hidden states, and shares its
    values. The modules are left with what they were rounded to, as floats. ``on_layer`` is told
    the layers done and all.

    Raises CalibrationError for a model without a list of decoder layers, or for inputs that are
    not finite.
    """
    rounding = _Rounding(specs)
    names = {module: name for name, module in model.named_modules()}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is table.weight
    if tied and specs.get(names[head]) != specs.get(names[table]):
        # Each is rounded in place from the float values, not from what the other became.
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        tied = False
    wanted = names[head] in specs
    layers = observe_layers(model, chunks[0])
    if tied and wanted:
        rounding.round(names[head], head, _head_statistics(model, chunks))
        rounding.share(names[table], names[head])
    else:
        rounding.round(names[table], table, None)
    hidden = first_hidden_states(model, chunks)
    for done, layer in enumerate(layers, 1):
        _round_layer(rounding, layer, hidden)
        if on_layer is not None:
            on_layer(done, len(layers))
    if wanted and not tied:
        rounding.round(names[head], head, _head_statistics(model, chunks))
    return rounding.done


class _Rounding:
    """Rounds modules by their specifications and puts the rounded values in their place."""

    def __init__(self, specs: Mapping[str, GridSpec]) -> None:
        self.specs = specs
        self.done: dict[str, RoundedWeight] = {}

    @torch.no_grad()
    def round(self, name: str, module: nn.Module, statistics: InputStatistics | None) -> None:
        """Round a module's weight in place, if it has a specification."""
        if name in self.specs:
            weight: Any = module.weight
            rounded = quantize_weight(weight.flatten(1), self.specs[name], statistics)
            weight.copy_(rounded.dequantize().reshape(weight.shape))
            self.done[name] = rounded

    def share(self, name: str, other: str) -> None:
        """Give ``name`` what ``other`` was rounded to."""
        if other in self.done:
            self.done[name] = self.done[other]


@torch.no_grad()
def _round_layer(rounding: _Rounding, layer: DecoderLayer, hidden: list[Tensor]) -> None:
    """Round one layer for its inputs ``hidden``, and replace these by its outputs."""
    modules = {f"{layer.path}.{name}": module for name, module in layer.module.named_modules()}
    inside = {name: module for name, module in modules.items() if name in rounding.specs}
    needing = {n: m for n, m in inside.items() if rounding.specs[n].algorithm in NEED_STATISTICS}

    def run() -> None:
        for states in hidden:
            layer.run(states)

    statistics = collect_statistics(needing, run) if needing else {}
    for name, module in inside.items():
        rounding.round(name, module, statistics.get(name))
    for index, states in enumerate(hidden):
        hidden[index] = layer.run(states)


def _head_statistics(model: Any, chunks: Tensor) -> InputStatistics:
    """Statistics of what the head is given."""
    found = None
    for states in final_hidden_states(model, chunks[:_CHUNKS_FOR_THE_HEAD]):
        new = InputStatistics.of(states)
        found = new if found is None else found + new
    assert found is not None, "there is a chunk"
    return found
