"""Writes an encoding into the quantize and dequantize calls of one value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import EncodingError
from edgepass.passes.quantized_values import QuantizedValue, attribute
from edgepass.passes.value_names import call_name


def write_encoding(
    module: GraphModule, value: QuantizedValue, encoding: Encoding, integers: Tensor | None = None
) -> None:
    """Replace the numbers in ``value``'s calls; ``integers`` replace a folded constant, too.

    Raises EncodingError for an encoding of another kind, or integers of another shape.
    """
    if not encoding.same_kind(value.encoding):
        raise EncodingError(
            f"another kind of encoding: got {encoding.bits} bits for {value.calls[0].name}, "
            f"accepted are {value.encoding.bits} bits of the same range, axis and block"
        )
    for call in value.calls:
        place = 2 if call_name(call).endswith("_affine") else 1
        _write(module, call, place, encoding.scale)
        _write(module, call, place + 1, encoding.zero_point)
    if integers is not None and value.integers is not None:
        _write_integers(module, value.integers, integers)


def _write(module: GraphModule, call: Node, place: int, numbers: Tensor) -> None:
    argument: Any = call.args[place]
    if isinstance(argument, Node):
        stored = attribute(module, str(argument.target))
        with torch.no_grad():
            stored.copy_(numbers.reshape(stored.shape))
    else:
        call.update_arg(place, numbers.item())


def _write_integers(module: GraphModule, constant: Node, integers: Tensor) -> None:
    path, _, name = str(constant.target).rpartition(".")
    owner = attribute(module, path) if path else module
    stored = getattr(owner, name)
    if stored.shape != integers.shape or stored.dtype != integers.dtype:
        raise EncodingError(
            f"another constant: got {list(integers.shape)} {integers.dtype} for {constant.target}, "
            f"accepted is {list(stored.shape)} {stored.dtype}"
        )
    # Shared with the source: the forms of one model hold its weights once.
    setattr(owner, name, integers)
