"""Writes a table of encodings, as read from a file, into a graph."""

from __future__ import annotations

import math

from torch.fx import GraphModule
from torchao.quantization.pt2e.constant_fold import constant_fold

from edgepass.ops.encodings import EncodingTable
from edgepass.ops.errors import EncodingError
from edgepass.passes.encoding_plan import EncodingPlan, EncodingSource
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.quantized_values import quantized_values, read_encodings
from edgepass.passes.value_names import ValueNames, is_quantize

_SHOWN = 5  # of a list of differences in one message


def apply_encodings(module: GraphModule, table: EncodingTable, prefix: str = "") -> int:
    """Give each quantization of ``module`` the encoding of its name in ``table``.

    ``module`` comes from ``convert_pt2e(..., fold_quantize=False)``: constants are quantized by
    the table, then folded. ``prefix`` is that of ``read_encodings``. Returns how many were written.

    Raises EncodingError, and leaves ``module`` as it was, unless the table has the names of the
    graph and no others, each with the graph's own range, axis and block.
    """
    foreign = read_encodings(module, prefix).diff(table, math.inf)
    if foreign:
        shown = "; ".join(f"{each.name}: {_said(each.reason)}" for each in foreign[:_SHOWN])
        more = f"; and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise EncodingError(
            f"encodings of another model or recipe: got {len(foreign)} names that do not fit: "
            f"{shown}{more}; accepted are the encodings of this model in this recipe"
        )
    names = ValueNames(module.graph, prefix)
    values = quantized_values(module, names)
    given = EncodingSource({name: [table[name]] for name in table}, calls=dict(names.calls))
    plan = EncodingPlan(given, names, values).resolve()
    for value, (encoding, _) in plan.items():
        write_encoding(module, value, encoding)
    constant_fold(module, is_quantize)
    module.recompile()
    return len(plan)


def _said(reason: str) -> str:
    ends = {"only in the first": "missing", "only in the second": "not in this model"}
    return ends.get(reason, reason)
