"""Which input of a graph is a cache, and which output extends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from edgepass.ops.errors import EncodingError
from edgepass.passes.value_names import JOINS, call_name, root_of

# Which arguments are the new rows.
_NEW_ROWS = {
    "aten.index_put": (2,),
    "aten.index_copy": (3,),
    "aten.copy": (1,),
    "aten.slice_scatter": (1,),
}


def kv_pairs_of(
    graph: Graph, explicit: Sequence[tuple[int, int]] | None = None
) -> list[tuple[Node, Node, Node]]:
    """(input, join, output value) of each cache: ``join`` puts new rows to the cache.

    ``explicit`` gives (input index, output index), counted over all inputs and outputs; else the
    pairs are found: an input is a cache if a call joins it with rows that the graph returns, or
    returns the joined whole.

    Raises EncodingError if an explicit pair does not exist, does not fit in shape or is joined
    nowhere, or if a found input has more than one candidate.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    outputs = list(_flat(graph.output_node().args[0]))
    if explicit is None:
        return _detect(inputs, outputs)
    pairs = []
    for i, j in explicit:
        if not (0 <= i < len(inputs) and 0 <= j < len(outputs)):
            raise EncodingError(
                f"no such KV pair: got input {i} and output {j}, accepted are inputs below "
                f"{len(inputs)} and outputs below {len(outputs)}"
            )
        pairs.append((inputs[i], _join_of(inputs[i]), outputs[j]))
    for cache, _, output in pairs:
        _check_shapes(cache, output)
    return pairs


def _detect(inputs: list[Node], outputs: list[Node]) -> list[tuple[Node, Node, Node]]:
    roots: dict[Node, list[Node]] = {}
    for output in outputs:
        roots.setdefault(root_of(output), []).append(output)
    pairs = []
    for cache in inputs:
        found = {
            (join, out)
            for join in _joins(cache)
            for row in [*map(root_of, _rows(join, cache)), join]
            for out in roots.get(row, ())
        }
        if len(found) > 1:
            # One tensor passed for several caches when the graph was exported looks like this, too.
            names = ", ".join(sorted(out.name for _, out in found))
            raise EncodingError(
                f"ambiguous KV pair: got input {cache.name} with the outputs {names}, accepted is "
                "one output; give the pairs, and a tensor of its own for each cache"
            )
        pairs += [(cache, join, out) for join, out in found]
    for cache, _, output in pairs:
        _check_shapes(cache, output)
    return pairs


def _joins(cache: Node) -> list[Node]:
    """The calls that join ``cache``, looking through views and quantizations."""
    found, pending = [], list(cache.users)
    while pending:
        user = pending.pop(0)
        if call_name(user) in JOINS:
            # But for `cat`, a join writes into its first argument: the rest are rows or places.
            whole = user.args[0]
            if not isinstance(whole, Node) or root_of(whole) is cache:
                found.append(user)
        elif user.op == "call_function" and root_of(user) is cache:
            pending += list(user.users)
    return list(dict.fromkeys(found))


def _join_of(cache: Node) -> Node:
    joins = _joins(cache)
    if len(joins) != 1:
        raise EncodingError(
            f"no KV input: got {cache.name}, which {len(joins)} calls join with new rows, accepted "
            "is one"
        )
    return joins[0]


def _rows(join: Node, cache: Node) -> list[Node]:
    return [part for part in joined_values(join) if root_of(part) is not cache]


def joined_values(join: Node) -> list[Node]:
    """What a call of ``JOINS`` puts together: of a ``cat`` its parts, else the whole, then rows."""
    if call_name(join) == "aten.cat":
        return list(join.args[0])  # type: ignore[arg-type]
    return [join.args[0], *(join.args[i] for i in _NEW_ROWS[call_name(join)])]  # type: ignore


def _check_shapes(cache: Node, output: Node) -> None:
    """The output must be rows of the cache: the same shape but for one dimension."""
    one: Any = cache.meta.get("val")
    other: Any = output.meta.get("val")
    other = root_value(output) if other is None else other
    if one is None or other is None:
        return
    shapes = tuple(one.shape), tuple(other.shape)
    apart = sum(a != b for a, b in zip(*shapes, strict=False))
    if len(shapes[0]) != len(shapes[1]) or apart > 1:
        raise EncodingError(
            f"KV pair of different shapes: got {cache.name} {list(shapes[0])} and {output.name} "
            f"{list(shapes[1])}, accepted are shapes that differ in one dimension"
        )


def root_value(node: Node) -> object:
    """The fake value of a quantization's input: PT2E gives its own calls none."""
    while node.meta.get("val") is None and node.op == "call_function" and node.args:
        node = node.args[0]  # type: ignore[assignment]
    return node.meta.get("val")


def _flat(outputs: object) -> list[Node]:
    if isinstance(outputs, Node):
        return [outputs]
    return [node for each in outputs for node in _flat(each)] if outputs else []  # type: ignore
