"""Quantization-aware training: a model that computes as its quantized form will, and learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_
from torchao.quantization.qat import (
    FakeQuantizeConfigBase,
    FakeQuantizerBase,
    IntxFakeQuantizeConfig,
    QATConfig,
)
from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
from torchao.quantization.qat.linear import FakeQuantizedLinear

from edgepass.calibration.recipe_resolution import ModuleRecipe, WeightSpec
from edgepass.calibration.weight_rounding import quantize_weight

Train = Callable[[nn.Module], object]
_FAKE = (FakeQuantizedLinear, FakeQuantizedEmbedding)


class RoundedInTraining(FakeQuantizerBase):
    """A weight as it will be rounded; its gradient passes as if it were not.

    torchao's own fake quantizer knows one grid (scale max/7.5), which is none that edgepass stores.
    """

    def __init__(self, config: FakeQuantizeConfigBase, spec: WeightSpec) -> None:
        super().__init__()
        # torchao asks it when it makes the module plain again.
        self.config, self.spec = config, spec

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = quantize_weight(weight.detach(), self.spec)  # type: ignore[arg-type]
            step = rounded.dequantize().to(weight.dtype) - weight
        return weight + step


def train_for(model: nn.Module, planned: Mapping[str, ModuleRecipe], train: Train) -> None:
    """Let ``train`` train ``model`` in place while it computes as ``planned`` says.

    ``planned`` are the modules' recipes by path; each computes with its rounded weight and, if its
    activations are dynamic, with inputs rounded to int8 by token. Afterwards the modules are plain
    linears and embeddings again, with the weights that were learnt, also if ``train`` fails.
    """
    _prepare(model, planned)
    try:
        train(model)
    finally:
        quantize_(model, QATConfig(step="convert"), lambda module, _: isinstance(module, _FAKE))


def _prepare(model: nn.Module, planned: Mapping[str, ModuleRecipe]) -> None:
    """Swap each quantized module for torchao's fake-quantized one, with edgepass's rounding."""
    quantized = {name: each for name, each in planned.items() if each.weights.bits is not None}
    rows = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    columns = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    for dynamic in (True, False):
        config = QATConfig(activation_config=rows if dynamic else None, weight_config=columns)
        chosen = {
            n for n, each in quantized.items() if (each.activations.kind != "none") == dynamic
        }
        quantize_(model, config, lambda _, path, chosen=chosen: path in chosen)
    for name, each in quantized.items():
        model.get_submodule(name).weight_fake_quantizer = RoundedInTraining(columns, each.weights)
