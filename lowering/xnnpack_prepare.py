"""From the fused graph to the form that XNNPACK delegates and the portable runtime share.

The cache update, the rows of the cache that are visible and the position tables stay outside the
delegates (their sizes depend on the position's value); attention, norms, rotary and linears are
left as single nodes for the visitors.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from edgepass.lowering.xnnpack_spelling import spell_activation
from edgepass.ops.errors import ProgramError
from edgepass.passes.cancel_views import reads_bits
from edgepass.passes.editor import Editor
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument, is_call

# Hidden rows get this much added before the softmax: exp() of it is exactly zero in float32.
HIDDEN = -1e9

_RULE = "prepare-xnnpack"
_FLOAT32_ONLY = (
    *("edgepass.rms_norm", "edgepass.rotary", "edgepass.masked_attention"),
    *("edgepass.linear_qta8a_qga4w", "edgepass.linear_qta8a_qc8w"),
)


@dataclass
class Positions:
    """The scalars and masks that all layers of a decoder share, made on first use."""

    program: WorkingProgram
    start: Node
    tokens: Node | int
    end: Node
    masks: dict[tuple[int, int], Node] = field(default_factory=dict)


def prepare(program: WorkingProgram, *, cache_dtype: torch.dtype = torch.float16) -> None:
    """Rewrite attention, cache updates and position tables of ``program`` in place.

    ``cache_dtype``: what keys and values are stored in, float16 or float32. Half the cache is half
    of what every decoded token reads; 11 bits of mantissa are kept.
    Raises ProgramError if an attention is not over one sequence (batch 1), or a fused operator's
    values are not float32.
    """
    positions: dict[Node, Positions] = {}
    for node in list(program.graph.nodes):
        if is_call(node, "edgepass.position_rows"):
            _replace_rows(_positions(program, positions, node.args[1], node), node)
        elif is_call(node, "edgepass.cached_attention"):
            shared = _positions(program, positions, node.args[3], node)
            _replace_attention(shared, node, cache_dtype)
    for node in list(program.graph.nodes):
        if is_call(node, "aten.reshape", "aten.view") and not reads_bits(node):
            _replace_view(program, node)
        elif is_call(node, "aten.transpose"):
            _replace_transpose(program, node)
        else:
            spell_activation(program, node)
    program.graph.eliminate_dead_code()
    program.remove_unused_constants()
    _require_float32(program)


def _require_float32(program: WorkingProgram) -> None:
    """Raise ProgramError for a fused operator of another dtype: no kernel would compute it."""
    for node in program.graph.nodes:
        if is_call(node, *_FLOAT32_ONLY) and node.meta["val"].dtype != torch.float32:
            dtype = str(node.meta["val"].dtype).removeprefix("torch.")
            raise ProgramError(
                f"cannot lower for XNNPACK: got {node.name} with dtype={dtype}, accepted is "
                "float32: export the module after `.float()`"
            )


def _positions(
    program: WorkingProgram, known: dict[Node, Positions], position: Node, user: Node
) -> Positions:
    """The scalars behind a position input: ``start`` its value, ``end`` start plus the tokens."""
    if position not in known:
        tokens = _token_count(program, user)
        first = next(n for n in program.graph.nodes if n.op == "call_function")
        editor = Editor(program, first, _RULE)
        start = editor.call(torch.ops.aten._local_scalar_dense, position)
        context = _context(program, position)
        start.meta["val"] = _unbacked(position, context - 1)
        _assert(editor, operator.ge, start, 0)
        _assert(editor, operator.le, start, context - 1)
        if isinstance(tokens, int):
            count: Node | int = tokens
        else:
            count = editor.call(torch.ops.aten.sym_size.int, *tokens)
            count.meta["val"] = tokens[0].meta["val"].shape[tokens[1]]
        end = editor.call(operator.add, start, count)
        end.meta["val"] = start.meta["val"] + _value(count)
        _assert(editor, operator.le, end, context)
        known[position] = Positions(program, start, count, end)
    return known[position]


def _unbacked(position: Node, most: int) -> torch.SymInt:
    """A fresh symbol, 0 to ``most``, for the position's value; a re-trace makes its own."""
    environment = position.meta["val"].fake_mode.shape_env
    with environment.ignore_fresh_unbacked_symbols():
        start = environment.create_unbacked_symint()
    torch._check(start >= 0)
    torch._check(start <= most)
    return start


def _assert(editor: Editor, compare: Any, value: Node, bound: int) -> None:
    """A runtime assertion: the re-trace needs the bound to size the slices."""
    condition = editor.call(compare, value, bound)
    condition.meta["val"] = True
    message = f"{value.name} must be {compare.__name__} {bound}"
    editor.call(torch.ops.aten._assert_scalar, condition, message).meta["val"] = None


def _token_count(program: WorkingProgram, user: Node) -> int | tuple[Node, int]:
    """The number of tokens: a constant, or the input and its dimension that have it."""
    size = user.meta["val"].shape[-2]
    if isinstance(size, int):
        return size
    for source in program.user_inputs:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor):
            for dimension, other in enumerate(value.shape):
                if str(other) == str(size):
                    return source, dimension
    raise ProgramError(f"{user.name}: got {size} tokens, expected the size of an input")


def _context(program: WorkingProgram, position: Node) -> int:
    lengths = [
        user.args[1].meta["val"].shape[2]
        if is_call(user, "edgepass.cached_attention")
        else user.args[0].meta["val"].shape[0]
        for user in position.users
        if is_call(user, "edgepass.cached_attention", "edgepass.position_rows")
    ]
    return int(min(lengths))


def _value(node: Node | int) -> Any:
    return node.meta["val"] if isinstance(node, Node) else node


def _replace_rows(shared: Positions, node: Node) -> None:
    editor = Editor(shared.program, node, _RULE)
    rows = editor.call(
        torch.ops.aten.slice.Tensor, node.args[0], 0, shared.start, shared.end, like=node
    )
    node.replace_all_uses_with(rows)
    shared.program.graph.erase_node(node)


def _replace_attention(shared: Positions, node: Node, cache_dtype: torch.dtype) -> None:
    query, keys, values, _, scale = node.args[:5]
    window, softcap = argument(node, "window"), argument(node, "softcap")
    if query.meta["val"].shape[0] != 1:
        raise ProgramError(
            f"{node.name}: got batch={query.meta['val'].shape[0]}, a cache holds one sequence"
        )
    editor = Editor(shared.program, node, _RULE)
    visible = [_update(shared, editor, write, cache_dtype) for write in (keys, values)]
    mask = _mask(shared, editor, int(keys.meta["val"].shape[2]), window)
    attention = editor.call(
        torch.ops.edgepass.masked_attention, query, *visible, mask, scale, softcap, like=node
    )
    node.replace_all_uses_with(attention)
    graph = shared.program.graph
    graph.erase_node(node)
    for write in dict.fromkeys((keys, values)):
        if not write.users:
            graph.erase_node(write)


def _update(shared: Positions, editor: Editor, write: Node, cache_dtype: torch.dtype) -> Node:
    """Write the new rows into the cache and return the visible ones, ``[1, Hkv, L, D]``.

    ``llama.update_cache`` writes ``[B, S, H, D]`` into ``[B, C, H, D]``. With the heads as the
    batch and one head each, the cache keeps the layout [Hkv, C, D] that the products read.
    """
    cache, _, _, rows = write.args
    _, heads, length, width = (int(size) for size in cache.meta["val"].shape)
    initial = shared.program.constant(cache)
    assert initial is not None, f"{cache} is a buffer of the program"
    name = shared.program.qualified_name(cache) or cache.name
    stored = shared.program.derive_constant(
        ("xnnpack cache", cache.name),
        name,
        lambda: initial.reshape(heads, length, 1, width).to(cache_dtype).clone(),
    )
    flat = editor.call(torch.ops.aten.view, rows, [heads, -1, 1, width])
    if rows.meta["val"].dtype != cache_dtype:
        flat = editor.call(torch.ops.edgepass.cast, flat, cache_dtype)
    update = editor.call(torch.ops.llama.update_cache.default, flat, stored, shared.start)
    update.meta["val"] = None
    visible = editor.call(torch.ops.aten.slice.Tensor, stored, 1, 0, shared.end)
    fake = stored.meta["val"]
    end = _value(shared.end)
    visible.meta["val"] = fake.new_empty((heads, end, 1, width))
    seen = editor.call(torch.ops.aten.view, visible, [1, heads, shared.end, width])
    seen.meta["val"] = fake.new_empty((1, heads, end, width))
    editor.complete_metadata()
    return seen


def _mask(shared: Positions, editor: Editor, context: int, window: int) -> Node:
    """The additive mask ``[S, L]``: 0 where a token sees a row, HIDDEN where not."""
    key = (context, window)
    if key not in shared.masks:
        shared.masks[key] = _make_mask(shared, editor, context, window)
    return shared.masks[key]


def _make_mask(shared: Positions, editor: Editor, context: int, window: int) -> Node:
    program = shared.program
    numbers = torch.arange(context, dtype=torch.float32)
    aten = torch.ops.aten
    steep = _constant(program, "steepness", torch.tensor([-HIDDEN]))
    rows = _constant(program, f"rows_{context}", numbers[:, None])
    columns = _constant(program, f"columns_{context}", numbers[None, :])
    tokens = editor.call(aten.slice.Tensor, rows, 0, shared.start, shared.end)
    tokens.meta["val"] = rows.meta["val"].new_empty((_value(shared.tokens), 1))
    seen = editor.call(aten.slice.Tensor, columns, 1, 0, shared.end)
    seen.meta["val"] = rows.meta["val"].new_empty((1, _value(shared.end)))
    distance = editor.call(aten.sub.Tensor, tokens, seen)
    mask = _hide_negative(editor, editor.call(aten.mul.Tensor, distance, steep))
    if window:
        # Visible is distance < window: window - 1 - distance must not be negative.
        reach = _constant(program, f"reach_{window}", torch.tensor([float(window - 1)]))
        left = editor.call(aten.sub.Tensor, reach, distance)
        far = _hide_negative(editor, editor.call(aten.mul.Tensor, left, steep))
        mask = editor.call(aten.add.Tensor, mask, far)
    editor.complete_metadata()
    return mask


def _hide_negative(editor: Editor, value: Node) -> Node:
    return editor.call(torch.ops.aten.clamp, value, HIDDEN, 0.0)


def _constant(program: WorkingProgram, name: str, tensor: torch.Tensor) -> Node:
    return program.derive_constant(("xnnpack", name), f"edgepass.{name}", tensor.contiguous)


def _replace_view(program: WorkingProgram, node: Node) -> None:
    """XNNPACK infers one size: give the only dynamic one as -1.

    A reshape of permuted values becomes a permuting copy and a view.
    """
    shape = node.meta["val"].shape
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        return
    editor = Editor(program, node, _RULE)
    source = node.args[0]
    if is_call(source, "aten.transpose", "aten.permute"):
        order = _order(source)
        source = editor.call(torch.ops.aten.permute_copy, source.args[0], order)
        source.meta["val"] = node.args[0].meta["val"].contiguous()
    elif is_call(node, "aten.reshape") and not source.meta["val"].is_contiguous():
        return
    view = editor.call(torch.ops.aten.view, source, sizes, like=node)
    node.replace_all_uses_with(view)
    program.graph.erase_node(node)


def _replace_transpose(program: WorkingProgram, node: Node) -> None:
    editor = Editor(program, node, _RULE)
    permute = editor.call(torch.ops.aten.permute, node.args[0], _order(node), like=node)
    node.replace_all_uses_with(permute)
    program.graph.erase_node(node)


def _order(node: Node) -> list[int]:
    """The permutation that a transpose or permute applies."""
    rank = node.args[0].meta["val"].dim()
    if is_call(node, "aten.permute"):
        return [dimension % rank for dimension in node.args[1]]
    order = list(range(rank))
    first, second = (dimension % rank for dimension in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return order
