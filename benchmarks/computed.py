"""A quantized model that computes in float: the same numbers, in less time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgepass.ops.quantize import quantize_dequantize


class Computed(nn.Module):
    """A linear of an int8 activation and a dequantized weight: torchao's numbers, in less time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(quantize_dequantize(x), self.weight)


def compute_in_float(model: Any) -> Any:
    """Dequantize the weights of a quantized ``model`` once, not at each call."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Computed(module.weight.dequantize()))
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model
