"""Encodings of a value that changes its width, such that the device's conversion is exact.

HTP converts 16 to 8 bits by a fixed-point factor whose error moves each rounding boundary by up to
1/80 of a step, so that 0.5 to 1.2 % of the values round the other way than on the host. If the wide
step is 1/256 of the narrow one and the zero points agree, the conversion is a shift and only exact
ties differ: 0.2 % of the values, which HTP rounds up and torch to even.
"""

from __future__ import annotations

from torch.fx import GraphModule

from edgepass.ops.encodings import Encoding
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.quantized_values import QuantizedValue, quantized_values
from edgepass.passes.value_names import ValueNames, call_name

# HTP computes their outputs in encodings of its own choice.
_FIXED = ("aten.sigmoid", "aten.softmax", "aten._softmax", "aten.tanh")


def align_conversions(module: GraphModule) -> int:
    """Give what is converted to 8 bits the encoding that it is converted to, refined to its width.

    ``module`` is a converted PT2E graph. A value of 16 bits takes ``scale / 256`` and ``256 *
    zero_point`` of the 8-bit one, which covers at least the same range; one of 8 bits takes the
    same encoding. Left alone are constants, operators with encodings of their own, and values that
    are converted to several encodings. Returns how many values changed; a second run changes none.
    """
    values = quantized_values(module, ValueNames(module.graph))
    by_call = {call: value for value in values for call in value.calls}
    wanted: dict[QuantizedValue, list[Encoding]] = {}
    for value in reversed(values):
        before = None if value.before is None else by_call.get(value.before)
        if before is None or not _may_change(before):
            continue
        passed_on = wanted.get(value, ()) if _repeats(before, value) else (value.encoding,)
        wanted.setdefault(before, []).extend(each for each in passed_on if each.bits == 8)
    count = 0
    for value, targets in wanted.items():
        if targets and all(targets[0].difference(each) == 0 for each in targets):
            count += _refine(module, value, targets[0])
    if count:
        module.recompile()
    return count


def _may_change(value: QuantizedValue) -> bool:
    unsigned = value.encoding.axis is None and not value.encoding.signed
    return unsigned and not value.is_parameter and call_name(value.root) not in _FIXED


def _repeats(before: QuantizedValue, value: QuantizedValue) -> bool:
    return before.encoding.difference(value.encoding) == 0


def _refine(module: GraphModule, value: QuantizedValue, narrow: Encoding) -> bool:
    steps = 2**value.encoding.bits // 2**narrow.bits
    fine = Encoding(narrow.scale / steps, narrow.zero_point * steps, 0, 2**value.encoding.bits - 1)
    if value.encoding.difference(fine) == 0:
        return False
    write_encoding(module, value, fine)
    return True
