"""Values that depend on positions alone: recognised by running them, and folded into tables.

Masks, cache indices and rotary angles are written in as many ways as there are models. Instead of
matching their spelling, the subgraph that computes one is run for many positions and its results
are compared with what they must be.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import Replacement, RewriteLog, RuleCount
from edgepass.passes.rule import Refusal
from edgepass.passes.targets import is_call

# A folded table may hold this many bytes: rotary tables of long contexts do, masks do not.
_TABLE_LIMIT = 64 << 20
# SIMD and scalar tails of sin and cos differ in the last bit; angles may not differ in more.
_LAST_BIT = 2.0**-22
# What an additive mask adds to hide a row is at least as large.
_HIDING = 1e4


@dataclass(frozen=True)
class PositionFunction:
    """A value computed from constants, one position input and the number of tokens only.

    Calling it runs the subgraph for tokens at ``start .. start + length - 1``.
    """

    program: WorkingProgram
    steps: tuple[Node, ...]
    output: Node
    position: Node

    def __call__(self, start: int, length: int) -> torch.Tensor:
        values: dict[Node, Any] = {self.position: torch.tensor([start])}
        for step in self.steps:
            if step.op == "placeholder":
                values[step] = self.program.constant(step)
            elif is_call(step, "aten.sym_size"):
                values[step] = length
            else:
                args, kwargs = map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return values[self.output]


class PositionAnalysis:
    """Finds position functions in one program; results are kept for the run of one pass."""

    def __init__(self, program: WorkingProgram) -> None:
        self.program = program
        self._mutable = program.mutable_constants()
        self._functions: dict[Node, PositionFunction | Refusal] = {}
        # The first ancestor that makes a value no position function, with the reason.
        self._blockers: dict[Node, tuple[Node, str] | None] = {}
        self._answers: dict[tuple[Node, Callable[..., Any], int], Any] = {}

    def function(self, node: Node) -> PositionFunction | Refusal:
        """The position function that ``node`` computes, or why it is none."""
        if node not in self._functions:
            self._functions[node] = self._trace(node)
        return self._functions[node]

    def ask(self, node: Node, question: Callable[..., Any], rows: int) -> Any | Refusal:
        """``question(function, rows)`` of the function at ``node``, answered once."""
        key = (node, question, rows)
        if key not in self._answers:
            function = self.function(node)
            refused = isinstance(function, Refusal)
            self._answers[key] = function if refused else question(function, rows)
        return self._answers[key]

    def _trace(self, output: Node) -> PositionFunction | Refusal:
        blocker = self._blocker(output)
        if blocker is not None:
            node, reason = blocker
            return Refusal(f"{output.name} depends on {node.name}: {reason}", node)
        steps, positions, lengths = [], set(), set()
        for node in _ancestors(output):
            if _is_position_input(node, self.program):
                positions.add(node)
                continue
            if is_call(node, "aten.sym_size"):
                lengths.add(str(node.meta["val"]))
            steps.append(node)
        if len(positions) != 1 or len(lengths) > 1:
            counts = f"{len(positions)} position inputs and {len(lengths)} token counts"
            return Refusal(f"{output.name} depends on {counts}, expected one and one", output)
        return PositionFunction(self.program, tuple(steps), output, positions.pop())

    def _blocker(self, output: Node) -> tuple[Node, str] | None:
        known = self._blockers
        for node in _ancestors(output, known):
            if is_call(node, "aten.sym_size") or _is_position_input(node, self.program):
                known[node] = None
                continue
            reason = self._why_not(node)
            inherited = (known[each] for each in node.all_input_nodes)
            known[node] = (node, reason) if reason else next(filter(None, inherited), None)
        return known[output]

    def _why_not(self, node: Node) -> str | None:
        if node.op == "placeholder":
            if not self.program.is_constant(node):
                return "it is an input and no position (int64 of shape [1])"
            return "the program changes it" if node in self._mutable else None
        if node.op != "call_function":
            return f"it is a {node.op}"
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return "it is random"
        schema = getattr(node.target, "_schema", None)
        return "it changes a tensor in place" if schema is not None and schema.is_mutable else None


def _ancestors(output: Node, known: Container[Node] = ()) -> Iterator[Node]:
    """Every node that ``output`` needs, sources first.

    A token count, or a node in ``known``, ends the search there.
    """
    done: set[Node] = set()
    pending = [(output, False)]
    while pending:
        node, expanded = pending.pop()
        if expanded:
            yield node
        elif node not in done and node not in known:
            done.add(node)
            pending.append((node, True))
            if not is_call(node, "aten.sym_size"):
                pending.extend((each, False) for each in node.all_input_nodes)


def _is_position_input(node: Node, program: WorkingProgram) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "placeholder"
        and not program.is_constant(node)
        and isinstance(value, torch.Tensor)
        and value.dtype == torch.int64
        and tuple(value.shape) == (1,)
    )


def sample_points(rows: int) -> list[tuple[int, int]]:
    """(start, length) pairs that cover every row once, each end, and a spread of others."""
    singles = sorted({0, 1, rows // 3, rows // 2, rows - 2, rows - 1} & set(range(rows)))
    chunks = [(start, min(length, rows - start)) for start, length in ((1, 5), (3, 17), (7, 128))]
    chunks += [(rows - rows // 3, rows // 3), (rows // 2, rows // 2)]
    points = [(0, rows), *((start, 1) for start in singles), *chunks]
    return [(start, length) for start, length in points if 0 <= start < rows and length > 0]


def positions_reason(function: PositionFunction, rows: int) -> str | None:
    """Why a function is not simply the positions ``start .. start + length - 1``; None if it is."""
    for start, length in sample_points(rows):
        got = function(start, length)
        if not torch.equal(got.reshape(-1), torch.arange(start, start + length)):
            return f"for {length} tokens at {start} it is not {start}..{start + length - 1}"
    return None


@dataclass(frozen=True)
class FoldPositions(GraphPass):
    """Turn float values that depend on positions alone into rows of one table.

    What it does: ``cos(position * inv_freq)`` and whatever else is float and computed from the
    position input only becomes ``edgepass::position_rows`` of a table over the whole context.

    Before: ``cos = aten.cos(aten.cat([angles, angles], -1))``
    After: ``cos = edgepass.position_rows(table, input_pos, tokens)``

    Refuses when: no attention with a cache bounds the positions; the value is not one row a token;
    a row changes with anything but its position; the table would exceed 64 MiB.

    Numerics: the table holds what the subgraph itself computes; last-bit differences of sin and
    cos between vector widths.

    Backends: all.
    """

    name: ClassVar[str] = "fold-positions"
    after: ClassVar[tuple[Order, ...]] = (
        Order("fuse-cached-attention", "the cache's length bounds the table"),
        Order("fuse-rotary", "rotary hands over the angles as they were before unsqueezing"),
    )
    agreement_db: ClassVar[float] = 120.0

    def run(self, program: WorkingProgram) -> RewriteLog:
        log = RewriteLog({self.name: RuleCount()})
        rows = _context(program)
        if rows is None:
            return log
        analysis = PositionAnalysis(program)
        for node in _frontier(program, analysis):
            count = log.counts[self.name]
            count.tried += 1
            table = _table(analysis, node, rows)
            if isinstance(table, Refusal):
                count.refused += 1
                continue
            count.applied += 1
            log.replacements.append(_fold(program, analysis, node, table))
        if log.changed:
            program.graph.eliminate_dead_code()
            program.remove_unused_constants()
        return log


def _context(program: WorkingProgram) -> int | None:
    sizes = [
        node.args[1].meta["val"].shape[2]
        for node in program.graph.nodes
        if is_call(node, "edgepass.cached_attention")
    ]
    return min(sizes, default=None)


def _frontier(program: WorkingProgram, analysis: PositionAnalysis) -> list[Node]:
    """Float values of positions alone that something else reads."""
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        if not value.is_floating_point() or is_call(node, "edgepass.position_rows"):
            continue
        if isinstance(analysis.function(node), Refusal) or _behind_table(node):
            continue
        if any(isinstance(analysis.function(user), Refusal) for user in node.users):
            found.append(node)
    return found


def _behind_table(node: Node) -> bool:
    """Whether the value is a view of rows that were folded before."""
    while is_call(node, "aten.view", "aten.unsqueeze") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_call(node, "edgepass.position_rows")


def _table(analysis: PositionAnalysis, node: Node, rows: int) -> torch.Tensor | Refusal:
    function = analysis.function(node)
    assert isinstance(function, PositionFunction), f"{node} is on the frontier"
    value = node.meta["val"]
    if value.dim() < 2 or any(size != 1 for size in value.shape[:-2]):
        return Refusal(f"{node.name} is not one row a token", node)
    if rows * int(value.shape[-1]) * value.element_size() > _TABLE_LIMIT:
        return Refusal(f"a table of {rows} x {value.shape[-1]} exceeds 64 MiB", node)
    table = function(0, rows)
    if table.shape[-2] != rows:
        return Refusal(f"{node.name} has {table.shape[-2]} rows for {rows} tokens", node)
    table = table.reshape(rows, -1).contiguous()
    # Values that hide a row say nothing of how large the others are.
    bound = _LAST_BIT * float(table.abs().masked_fill(table.abs() >= _HIDING, 0.0).max())
    for start, length in sample_points(rows):
        got = function(start, length).reshape(length, -1)
        if not torch.allclose(got, table[start : start + length], rtol=0.0, atol=bound):
            return Refusal(f"row {start} of {node.name} changes with the tokens beside it", node)
    return table


def _fold(
    program: WorkingProgram, analysis: PositionAnalysis, node: Node, table: torch.Tensor
) -> Replacement:
    function = analysis.function(node)
    assert isinstance(function, PositionFunction), f"{node} is on the frontier"
    editor = Editor(program, node, FoldPositions.name)
    length = token_count(program, editor, function)
    constant = program.derive_constant(
        ("positions", node.name), f"positions.{node.name}", lambda: table
    )
    rows = editor.call(torch.ops.edgepass.position_rows, constant, function.position, length)
    wide = rows
    for _ in range(node.meta["val"].dim() - 2):
        wide = editor.call(torch.ops.aten.unsqueeze, wide, 0)
    for user in list(node.users):
        user.replace_input_with(node, rows if is_call(user, "edgepass.rotary") else wide)
    editor.complete_metadata()
    return Replacement(node.name, wide, FoldPositions.name)


def token_count(program: WorkingProgram, editor: Editor, function: PositionFunction) -> Node | int:
    """The number of tokens as a node (or as a number where it is static)."""
    for step in function.steps:
        if is_call(step, "aten.sym_size"):
            return step
    size = next(s for s in function.output.meta["val"].shape[-2:-1])
    assert isinstance(size, int), f"{function.output} has a dynamic size without a source"
    return size
