"""The quantizations in a PT2E graph: what each encodes, and under which names it is known.

A quantization is a quantize call with the dequantize calls that read it, or the dequantize call of
a constant that was folded into integers. Both spellings are read: ``quantized_decomposed`` and
``torchao``; each tensor, channel or block.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgepass.ops.encodings import Encoding, EncodingTable
from edgepass.ops.errors import EncodingError
from edgepass.passes.value_names import (
    ValueNames,
    call_name,
    is_dequantize,
    is_quantize,
    is_view,
    root_of,
)


@dataclass(eq=False)
class QuantizedValue:
    """One quantization of a graph.

    ``calls`` are the quantize call, if any, and the dequantize calls that read it: all take one
    encoding. ``names`` are those of :class:`ValueNames`; none if it stands between two views, where
    it repeats a neighbour's encoding. ``before`` is the quantization that its input comes from
    through views alone, ``root`` what is behind all of them. ``integers`` is the folded constant.
    """

    calls: list[Node]
    encoding: Encoding
    root: Node
    before: Node | None
    names: list[str] = field(default_factory=list)
    integers: Node | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether the value is a constant of the graph."""
        return self.root.op == "get_attr"


def quantized_values(module: GraphModule, names: ValueNames) -> list[QuantizedValue]:
    """Every quantization of ``module``, in the order of its graph.

    Raises EncodingError if a quantize call and its dequantize calls disagree.
    """
    found = []
    for node in module.graph.nodes:
        if is_quantize(node):
            readers = [user for user in node.users if is_dequantize(user)]
            found.append(_value(module, names, [node, *readers]))
        elif is_dequantize(node) and node.args[0].op == "get_attr":
            found.append(_value(module, names, [node]))
    return found


def read_encodings(
    module: GraphModule, prefix: str = "", joins: Container[Node] = ()
) -> EncodingTable:
    """The encodings of a PT2E graph by name; see ``value_names`` for ``prefix`` and ``joins``.

    Raises EncodingError if one name stands for two encodings.
    """
    table = EncodingTable()
    for value in quantized_values(module, ValueNames(module.graph, prefix, joins)):
        section = table.parameters if value.is_parameter else table.activations
        for name in value.names:
            known = section.setdefault(name, value.encoding)
            if known.difference(value.encoding) > 0:
                raise EncodingError(
                    f"ambiguous encoding: got two for {name}, accepted are graphs in which each "
                    "name stands for one"
                )
    return table


def _value(module: GraphModule, names: ValueNames, calls: list[Node]) -> QuantizedValue:
    first, *readers = calls
    encoding = encoding_of(module, first)
    for reader in readers:
        if encoding_of(module, reader).difference(encoding) > 0:
            raise EncodingError(
                f"inconsistent quantization: got {reader.name} with another encoding than "
                f"{first.name}, accepted are pairs that agree"
            )
    source: Any = first.args[0]
    while is_view(source):
        source = source.args[0]
    before = source.args[0] if is_dequantize(source) else None
    if before is not None and before.op == "get_attr":
        before = source
    value = QuantizedValue(calls, encoding, root_of(first), before)
    value.integers = first.args[0] if is_dequantize(first) else None
    if value.is_parameter:
        value.names = _parameter_names(names, calls)
    else:
        value.names = _activation_names(names, value)
    return value


def _parameter_names(names: ValueNames, calls: list[Node]) -> list[str]:
    readers = [call for call in calls if is_dequantize(call)]
    found = [
        names.parameter(user, through)
        for user, through in _consumers(readers)
        if user.op != "output"
    ]
    return list(dict.fromkeys(found))


def _activation_names(names: ValueNames, value: QuantizedValue) -> list[str]:
    # Distinct quantizations of one input, one a user, are told apart by their users.
    first = value.before is None and value.root.op != "placeholder"
    found = [names.result(value.root)] if first else []
    for user, through in _consumers([call for call in value.calls if is_dequantize(call)]):
        if user.op == "output":
            found.append(names.returned(value.root))
        elif not is_quantize(user):
            found += names.argument(user, through)
    return list(dict.fromkeys(found))


def _consumers(readers: list[Node]) -> list[tuple[Node, Node]]:
    """What takes the value, through views: (user, the argument as which it takes it)."""
    found, pending = [], list(readers)
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if is_view(user):
                pending.append(user)
            else:
                found.append((user, node))
    return found


def attribute(module: GraphModule, name: str) -> Any:
    """The attribute of a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _tensor(module: GraphModule, argument: Any) -> Tensor:
    if isinstance(argument, Node):
        if argument.op != "get_attr":
            raise EncodingError(
                f"dynamic encoding: got {argument.name}, accepted are scales and zero points that "
                "are constants"
            )
        return attribute(module, str(argument.target))
    return torch.tensor(argument)


def encoding_of(module: GraphModule, call: Node) -> Encoding:
    """The encoding in the arguments of a quantize or dequantize call.

    Raises EncodingError for one that is computed, or of blocks that are not along axis 1.
    """
    kind = call_name(call)
    args: Any = call.args
    if kind.endswith("per_tensor"):
        scale, zero = (_tensor(module, each).reshape(()) for each in args[1:3])
        return Encoding(scale, zero, int(args[3]), int(args[4]))
    if kind.endswith("per_channel"):
        scale, zero = (_tensor(module, each) for each in args[1:3])
        return Encoding(scale, zero, int(args[4]), int(args[5]), axis=int(args[3]))
    scale, zero = (_tensor(module, each) for each in args[2:4])
    block, axis = _block(module, call, scale)
    shape = [] if axis is None else [scale.shape[axis]] if block is None else [scale.shape[0], -1]
    return Encoding(
        scale.reshape(shape),
        zero.reshape(shape),
        int(args[5]),
        int(args[6]),
        axis=axis,
        block=block,
    )


def _block(module: GraphModule, call: Node, scale: Tensor) -> tuple[int | None, int | None]:
    """Block and axis of torchao's block sizes: all of a tensor, of a channel, or part of a row."""
    sizes = [int(size) for size in call.args[1]]  # type: ignore[union-attr]
    if scale.numel() == 1:
        return None, None
    many = [axis for axis, count in enumerate(scale.shape) if count > 1]
    if len(many) == 1 and sizes[many[0]] == 1 and many[0] == 0 and sizes[1] == _row(module, call):
        return None, 0
    if sizes[0] == 1 and all(count == 1 for count in scale.shape[2:]):
        return sizes[1], 0
    raise EncodingError(
        f"unknown blocks: got {call.name} with block_size={sizes}, accepted are blocks along "
        "axis 1 of one channel of axis 0"
    )


def _row(module: GraphModule, call: Node) -> int:
    source: Any = call.args[0]
    if is_quantize(source):
        source = source.args[0]
    if source.op == "get_attr":  # folded constants have no value of their own
        return int(attribute(module, str(source.target)).shape[1])
    value = source.meta.get("val")
    return -1 if value is None else int(value.shape[1])
