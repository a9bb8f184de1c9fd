"""Checks of operator arguments that kernels and fake kernels share.

Under export a size may be symbolic. Comparing one would specialise the graph, so that only sizes
that are plain numbers are compared; the CPU kernel, which sees numbers only, checks them all.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from edgepass.ops.errors import InvalidArgumentError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Zero points of weights: integers, or floats where a grid's offset is no multiple of its scale.
ZERO_DTYPES = (torch.int8, *FLOAT_DTYPES)


def refuse(operator: str, name: str, value: object, accepted: str) -> None:
    """Raise InvalidArgumentError: ``operator: got name=value; accepted``."""
    raise InvalidArgumentError(f"{operator}: got {name}={value}; expected {accepted}")


def check_dtype(
    operator: str, name: str, tensor: torch.Tensor, accepted: Iterable[torch.dtype]
) -> None:
    """Refuse a tensor whose dtype is not one of ``accepted``."""
    accepted = tuple(accepted)
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        refuse(operator, f"{name}.dtype", str(tensor.dtype).removeprefix("torch."), names)


def check_shape(
    operator: str, name: str, tensor: torch.Tensor, expected: Sequence[Any], meaning: str
) -> None:
    """Refuse a tensor whose rank or whose known sizes differ from ``expected``."""
    sizes = tensor.shape
    if len(sizes) != len(expected) or any(map(known_unequal, sizes, expected)):
        wanted = ", ".join(str(size) for size in expected)
        refuse(operator, f"{name}.shape", list(sizes), f"[{wanted}] ({meaning})")


def known_unequal(left: Any, right: Any) -> bool:
    """Whether two sizes are plain numbers and differ; False when either is symbolic."""
    return isinstance(left, int) and isinstance(right, int) and left != right
