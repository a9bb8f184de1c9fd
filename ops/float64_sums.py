"""Sums in float64, so that graphs can be compared without the rounding errors of their sums.

A float32 sum depends on the order of its additions, and that on the number of rows: one token and
a chunk of tokens differ by 1e-7, which a quantization behind them makes a whole step now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# torch has no public name for it, though its own documentation shows it.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_SUMS = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "convolution", "mean", "sum"),
        *("_softmax", "_log_softmax", "native_layer_norm", "_fused_rms_norm"),
    }
)


class Float64Sums(TorchDispatchMode):
    """While it is entered, the float32 sums of ATen run in float64 and are rounded once at the end.

    Operators of other libraries (quantization) and those that sum nothing are left alone. Without
    gradients: under autograd the modules' own operators come first.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = (args, dict(kwargs or {}))
        sums = func.namespace == "aten" and func.overloadpacket.__name__ in _SUMS
        if not sums or not any(map(_is_float32, tree_leaves(given))):
            return func(*given[0], **given[1])
        args, kwargs = tree_map(lambda v: v.double() if _is_float32(v) else v, given)
        return tree_map(_to_float32, func(*args, **kwargs))


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
