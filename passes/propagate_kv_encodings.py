"""Carries the encodings of a calibrated graph into another form of the same model.

The graph that is calibrated runs a whole chunk at once; the graphs that are lowered take KV caches
as inputs. Values are matched by their structural names, caches by their pairs of input and output,
never by position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from edgepass.ops.errors import EncodingError
from edgepass.passes.encoding_plan import EncodingPlan, EncodingSource
from edgepass.passes.encoding_writer import write_encoding
from edgepass.passes.kv_pairs import kv_pairs_of
from edgepass.passes.quantized_values import QuantizedValue, attribute, quantized_values
from edgepass.passes.value_names import ValueNames, root_of


@dataclass(frozen=True)
class Propagation:
    """What was written: the number of quantizations, and the pairs (cache, what extends it)."""

    written: int
    pairs: list[tuple[str, str]]


def propagate_kv_encodings(
    source: GraphModule,
    target: GraphModule,
    kv_pairs: Sequence[tuple[int, int]] | None = None,
    prefix: str = "",
) -> Propagation:
    """Give each quantization of ``target`` the encoding that its value has in ``source``.

    Both are graphs of ``convert_pt2e`` of one model, quantized by one recipe. ``kv_pairs`` are
    (input index, output index) of the target's caches; by default they are found. A cache, its
    join and what extends it take the encoding of the output of ``source`` that corresponds to the
    pair's output. Folded constants come along. ``prefix`` is left out of names in messages.

    Raises EncodingError, and leaves ``target`` as it was, unless every quantized value of the
    target has exactly one encoding of its own kind (range, axis, block).
    """
    pairs = kv_pairs_of(target.graph, kv_pairs)
    given = _read_source(source, prefix)
    names = ValueNames(target.graph, prefix, {join for _, join, _ in pairs})
    values = quantized_values(target, names)
    for cache, join, output in pairs:
        _name_caches(values, names, cache, join, output)
    plan = EncodingPlan(given, names, values).resolve()
    for value, (encoding, integers) in plan.items():
        write_encoding(target, value, encoding, integers)
    target.recompile()
    _check_chained(target, pairs)
    return Propagation(len(plan), [(cache.name, names.result(out)) for cache, _, out in pairs])


def _read_source(module: GraphModule, prefix: str) -> EncodingSource:
    pairs = kv_pairs_of(module.graph)
    names = ValueNames(module.graph, prefix, {join for _, join, _ in pairs})
    found = EncodingSource(calls=dict(names.calls))
    for value in quantized_values(module, names):
        for name in value.names:
            found.encodings.setdefault(name, []).append(value.encoding)
            if value.integers is not None:
                found.integers[name] = attribute(module, str(value.integers.target))
    return found


def _name_caches(
    values: list[QuantizedValue], names: ValueNames, cache: Node, join: Node, output: Node
) -> None:
    """Name what holds cache rows after the output that extends the cache."""
    returned = names.returned(output)
    for value in values:
        if value.root is cache or value.root is join:
            value.names = [returned]


def _check_chained(module: GraphModule, pairs: Any) -> None:
    """What a step writes must be what the next one reads."""
    values = quantized_values(module, ValueNames(module.graph))
    for cache, join, output in pairs:
        last = output.args[0] if output.args else None
        written = [v.encoding for v in values if output in v.calls or last in v.calls]
        read = [v.encoding for v in values if v.root is cache or v.root is join]
        if written and any(written[0].difference(each) > 0 for each in read):
            raise EncodingError(
                f"broken cache chain: got {cache.name} read with another encoding than "
                f"{root_of(output).name} is written with, accepted is one"
            )
