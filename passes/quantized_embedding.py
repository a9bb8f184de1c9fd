"""A lookup in a dequantized table, as one operator on the quantized table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.matching import Match
from edgepass.passes.pattern import named, ops
from edgepass.passes.quantized_weight import (
    DEQUANTIZE_WEIGHT,
    GroupedWeight,
    check_scales,
    read_grouped_weight,
)
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor

aten = ops("aten")


class QuantizedEmbedding(RewriteRule):
    """``aten.embedding`` of a table that is dequantized by groups."""

    name = "quantized-embedding"

    def pattern(self, ids: Any) -> Any:
        return aten.embedding(named("table", DEQUANTIZE_WEIGHT(...)), ids, ...)

    def check(self, match: Match) -> Refusal | None:
        ids, result = fake_tensor(match.ids), fake_tensor(match.anchor)
        if ids is None or result is None or ids.dtype not in (torch.int64, torch.int32):
            return Refusal(f"the ids of {match.anchor.name} are no int64 or int32", match.anchor)
        table = read_grouped_weight(match.program, match.table)
        if isinstance(table, Refusal):
            return table
        if not table.fits_int4 and table.is_unsigned:
            return Refusal(f"the table {table.values.name} is uint8, expected int8", table.values)
        match.facts.update(table=table, dtype=result.dtype)
        return check_scales(table, result.dtype)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        table: GroupedWeight = match.facts["table"]
        return editor.call(
            torch.ops.edgepass.embedding_qg,
            table.packed() if table.fits_int4 else table.values,
            table.group_scales(match.facts["dtype"]),
            table.group_zeros() if table.has_zeros else None,
            table.group_size,
            4 if table.fits_int4 else 8,
            match.ids,
        )


@dataclass(frozen=True)
class FuseQuantizedEmbedding(GraphPass):
    """Look rows up in the quantized table instead of dequantizing all of it.

    What it does: the lookup reads 4-bit values (in the layout that linears read, so that a tied
    head shares the bytes) or int8 values, and dequantizes only the rows it takes.

    Before: ``embedding(dequantize(table, scales, zeros), ids)``
    After: ``edgepass.embedding_qg(table, scales, zeros, group_size, bits, ids)``

    Refuses when: the table is no constant ``[V, K]`` by groups of a row; it is unsigned with more
    than 4 bits; its scales do not fit the result's dtype; the ids are no integers.

    Numerics: the same bits in float32.

    Backends: all.
    """

    name: ClassVar[str] = "fuse-quantized-embedding"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "quantized parameters must be unwrapped, tied tables merged"),
    )
    agreement_db: ClassVar[float] = 120.0

    def rules(self) -> Sequence[RewriteRule]:
        return (QuantizedEmbedding(),)
