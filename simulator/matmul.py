"""Products of float matrices: impl/Matmul.cpp, impl/Linear.cpp."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgepass.simulator.registry import Kernel, Site, operator, prepared


@operator("aten.mm.default", "aten.bmm.default")
def matmul(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


@operator("aten.addmm.default")
def addmm(bias: Tensor, x: Tensor, y: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@prepared("aten.linear.default")
def linear(site: Site) -> Kernel:
    """Weight ``[N, K]`` and bias ``[N]`` are constants that the runtime packs."""
    weight = site.constant(1).float()
    bias = None if site.argument(2) is None else site.constant(2).float()
    return lambda x, *_: F.linear(x, weight, bias)
