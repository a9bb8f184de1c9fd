"""Quantize an activation once for all the linears that read it."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import Replacement, RewriteLog, RuleCount
from edgepass.passes.targets import is_call, operator_name

_PURE = {
    *("torchao.choose_qparams_affine", "torchao.quantize_affine", "torchao.dequantize_affine"),
    "quantized_decomposed.choose_qparams_per_token_asymmetric",
    "quantized_decomposed._choose_qparams_per_token_asymmetric_impl",
    *("quantized_decomposed.quantize_per_token", "quantized_decomposed.dequantize_per_token"),
    "quantized_decomposed.dequantize_per_channel_group",
    "quantized_decomposed.dequantize_per_channel",
}


@dataclass(frozen=True)
class ShareActivationQuantization(GraphPass):
    """Merge calls that choose, apply or undo the same quantization of the same value.

    What it does: the linears of Q, K and V, and of gate and up, each bring their own quantization
    of one activation; after this pass they share one. Tied weights share one dequantization.

    Before: ``linear(dq(q(x)), w1); linear(dq(q(x)), w2)``
    After: ``y = dq(q(x)); linear(y, w1); linear(y, w2)``

    Refuses when: an argument differs, or the value is changed in place by the program.

    Numerics: the same bits.

    Backends: all.
    """

    name: ClassVar[str] = "share-activation-quantization"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "views and casts that change nothing make equal inputs look apart"),
    )

    def run(self, program: WorkingProgram) -> RewriteLog:
        count = RuleCount()
        log = RewriteLog({self.name: count})
        mutations = program.find_mutations()
        kept: dict[Hashable, list[Node]] = {}  # by operator and first argument
        for node in list(program.graph.nodes):
            if not _is_quantization(node):
                continue
            count.tried += 1
            if mutations and any(map(mutations.is_changed, node.all_input_nodes)):
                count.refused += 1
                continue
            alike = kept.setdefault((id(node.target), node.args[:1]), [])
            twin = _twin(node, alike)
            if twin is None:
                alike.append(node)
                continue
            node.replace_all_uses_with(twin)
            log.replacements.append(Replacement(node.name, twin, self.name))
            program.graph.erase_node(node)
            count.applied += 1
        return log


def _is_quantization(node: Node) -> bool:
    if node.op != "call_function":
        return False
    name = operator_name(node.target)
    return is_call(node.args[0], *_PURE) if name == "operator.getitem" else name in _PURE


def _twin(node: Node, others: list[Node]) -> Node | None:
    """Return the call among ``others``, of the same target, that has the same arguments."""
    for each in others:
        if _same(each.args, node.args) and _same(each.kwargs, node.kwargs):
            return each
    return None


def _same(left: Any, right: Any) -> bool:
    """Compare arguments by value and type: 1, 1.0 and True are not one argument."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Node):
        return left is right
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)
