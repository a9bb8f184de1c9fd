"""Encodings of a value that changes its width, such that the device's conversion is exact.

HTP converts 16 to 8 bits by a fixed-point factor whose error moves each rounding boundary by up to
1/80 of a step, so that 0.5 to 1.2 % of the values round the other way than on the host. If the wide
step is 1/256 of the narrow one and the zero points agree, the conversion is a shift and only exact
ties differ: 0.2 % of the values, which HTP rounds up and torch to even. From unsigned to signed 16
bits it is exact if the scales agree and the zero points are 32,768 apart.
"""

from __future__ import annotations

from torch.fx import GraphModule

from edgepass.ops.encodings import Encoding
from edgepass.ops.errors import EncodingError
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.quantized_values import QuantizedValue, quantized_values
from edgepass.passes.value_names import ValueNames, call_name

# HTP computes their outputs in encodings of its own choice.
_FIXED = ("aten.sigmoid", "aten.softmax", "aten._softmax", "aten.tanh")
_INT16 = -(2**15), 2**15 - 1


def align_conversions(module: GraphModule) -> int:
    """Give what is converted to 8 or to signed 16 bits the encoding that it is converted to.

    ``module`` is a converted PT2E graph. A value of 16 bits takes ``scale / 256`` and ``256 *
    zero_point`` of the 8-bit one, which covers at least the same range, or the steps of the signed
    one; one of 8 bits takes the same encoding. Left alone are constants, operators with encodings
    of their own, and values that are converted to several encodings. Returns how many values
    changed; a second run changes none.
    """
    values = quantized_values(module, ValueNames(module.graph))
    by_call = {call: value for value in values for call in value.calls}
    wanted: dict[QuantizedValue, list[Encoding]] = {}
    for value in reversed(values):
        before = None if value.before is None else by_call.get(value.before)
        if before is None or not _may_change(before):
            continue
        passed_on = wanted.get(value, ()) if _repeats(before, value) else (value.encoding,)
        wanted.setdefault(before, []).extend(filter(_is_narrow, passed_on))
    count = 0
    for value, targets in wanted.items():
        if targets and all(targets[0].difference(each) == 0 for each in targets):
            count += _refine(module, value, targets[0])
    if count:
        module.recompile()
    return count


def check_conversions(module: GraphModule) -> None:
    """Raise EncodingError for a change of 16-bit sign that the stock backend computes wrong.

    It takes scales less than 1e-6 apart for equal if the zero points are 32,768 apart.
    """
    values = quantized_values(module, ValueNames(module.graph))
    by_call = {call: value for value in values for call in value.calls}
    for value in values:
        before = None if value.before is None else by_call.get(value.before)
        if before is not None and _is_taken_for_equal(before.encoding, value.encoding):
            raise EncodingError(
                f"change of sign that HTP computes wrong: got {value.calls[0].name} with scales "
                f"{before.encoding.scale.item():.6g} and {value.encoding.scale.item():.6g} and "
                "zero points 32768 apart, accepted are equal scales or other zero points"
            )


def _is_taken_for_equal(one: Encoding, other: Encoding) -> bool:
    if one.axis is not None or (one.bits, other.bits) != (16, 16) or one.signed == other.signed:
        return False
    scales = float(one.scale), float(other.scale)
    apart = abs(int(one.zero_point) - int(other.zero_point))
    return apart == 2**15 and 1e-6 * scales[0] < abs(scales[0] - scales[1]) < 1e-6


def _may_change(value: QuantizedValue) -> bool:
    unsigned = value.encoding.axis is None and not value.encoding.signed
    return unsigned and not value.is_parameter and call_name(value.root) not in _FIXED


def _is_narrow(encoding: Encoding) -> bool:
    return encoding.bits == 8 or (encoding.quant_min, encoding.quant_max) == _INT16


def _repeats(before: QuantizedValue, value: QuantizedValue) -> bool:
    return before.encoding.difference(value.encoding) == 0


def _refine(module: GraphModule, value: QuantizedValue, narrow: Encoding) -> bool:
    steps = 2**value.encoding.bits // 2**narrow.bits
    zero = (narrow.zero_point - narrow.quant_min) * steps
    fine = Encoding(narrow.scale / steps, zero, 0, 2**value.encoding.bits - 1)
    if value.encoding.difference(fine) == 0:
        return False
    write_encoding(module, value, fine)
    return True
