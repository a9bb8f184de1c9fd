"""Root mean square layer normalisation (Zhang and Sennrich, 2019), recognised as one operator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.matching import Match
from edgepass.passes.pattern import any_of, attr, axis, maybe, named, ops
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor
from edgepass.passes.targets import render_value

aten = ops("aten")
_CASTS = aten.to | aten._to_copy | aten.type_as
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ComposedRmsNorm(RewriteRule):
    """``weight * (x * rsqrt(mean(x^2) + eps))`` and its spellings, casts anywhere between."""

    name = "composed-rms-norm"

    def pattern(self, x: Any, weight: Any, eps: Any) -> Any:
        wide = maybe(_CASTS, x)
        square = any_of(aten.pow(wide, 2), aten.mul(wide, wide), aten.square(wide))
        shifted = aten.add(named("mean", aten.mean(square, axis(-1), True, ...)), eps)
        unit = any_of(
            aten.mul(wide, any_of(aten.rsqrt(shifted), aten.reciprocal(aten.sqrt(shifted)))),
            aten.div(wide, aten.sqrt(shifted)),
        )
        known = maybe(_CASTS, weight)
        scaled = aten.mul(maybe(_CASTS, unit), any_of(named("one_plus", aten.add(known, 1)), known))
        return any_of(_CASTS(scaled, ...), scaled)

    def check(self, match: Match) -> Refusal | None:
        eps = match.program.number(match.eps)
        if eps is None:
            return Refusal(f"eps is {render_value(match.eps)}, not a number", match.anchor)
        match.facts["eps"] = float(eps)
        return _check_input(match) or _check_steps(match) or _check_weight(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        weight = match.weight
        if match.one_plus is not None:
            weight = _one_plus(match.program, weight)
        return editor.call(torch.ops.edgepass.rms_norm, match.x, weight, match.facts["eps"])


class AtenRmsNorm(RewriteRule):
    """``aten.rms_norm`` over the last dimension, with or without a weight."""

    name = "aten-rms-norm"

    def pattern(self, x: Any, weight: Any) -> Any:
        return aten.rms_norm(x, attr("normalized_shape"), weight, attr("eps"))

    def check(self, match: Match) -> Refusal | None:
        x = fake_tensor(match.x)
        if len(match.normalized_shape) != 1:
            return Refusal(f"it normalizes over {list(match.normalized_shape)}", match.anchor)
        if match.eps is None and (x is None or x.dtype != torch.float32):
            return Refusal("eps is not given, and its default in 16 bits varies", match.anchor)
        return _check_input(match) or (_check_weight(match) if match.weight is not None else None)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        eps = torch.finfo(torch.float32).eps if match.eps is None else float(match.eps)
        weight = match.weight
        if weight is None:
            size = match.normalized_shape[0]
            weight = match.program.derive_constant(
                ("ones", size), f"rms_norm_ones_{size}", lambda: torch.ones(size)
            )
        return editor.call(torch.ops.edgepass.rms_norm, match.x, weight, eps)


def _check_input(match: Match) -> Refusal | None:
    """The operator computes in float32 and returns the input's dtype."""
    before, after = fake_tensor(match.x), fake_tensor(match.anchor)
    if before is None or after is None or before.dtype not in _FLOATS:
        return Refusal(f"{render_value(match.x)} is no float tensor", match.anchor)
    if before.dtype != after.dtype:
        return Refusal(
            f"it turns {before.dtype} into {after.dtype}, expected the input's dtype", match.anchor
        )
    return None


def _check_steps(match: Match) -> Refusal | None:
    """The mean is taken in float32, and nothing in between is narrower than the input."""
    x, mean = fake_tensor(match.x), fake_tensor(match.mean)
    assert x is not None, "checked by _check_input"
    if mean is None or mean.dtype != torch.float32:
        got = None if mean is None else mean.dtype
        return Refusal(f"the mean of squares is taken in {got}, expected float32", match.mean)
    for node in match.nodes:
        step = fake_tensor(node)
        if step is not None and step.dtype not in (x.dtype, torch.float32):
            return Refusal(f"{node.name} rounds to {step.dtype} on the way", node)
    return None


def _check_weight(match: Match) -> Refusal | None:
    weight, x = fake_tensor(match.weight), fake_tensor(match.x)
    assert x is not None, "checked by _check_input"
    if weight is None or tuple(weight.shape) != (x.shape[-1],):
        shape = None if weight is None else list(weight.shape)
        return Refusal(
            f"the weight {render_value(match.weight)} has shape {shape}, "
            f"expected [{x.shape[-1]}] for the last dimension",
            match.anchor,
        )
    if "one_plus" in match and match.program.constant(match.weight) is None:
        return Refusal(f"1 is added to {match.weight.name}, which is no constant", match.weight)
    return None


def _one_plus(program: WorkingProgram, weight: Node) -> Node:
    """Return the constant ``1 + weight`` in float32, as Gemma adds it."""
    tensor, name = program.constant(weight), program.qualified_name(weight)
    assert tensor is not None, "established by check"
    return program.derive_constant(
        ("one-plus", weight), f"{name}_plus_one", lambda: 1.0 + tensor.float()
    )


@dataclass(frozen=True)
class FuseRmsNorm(GraphPass):
    """Recognise RMSNorm and make it ``edgepass::rms_norm``.

    What it does: the power, mean, rsqrt and two multiplications become one operator, in the
    spellings of Llama, Gemma (``1 + weight``, folded into the constant) and OLMo2, with the casts
    to float32 and back; ``aten.rms_norm``; norms of queries and keys over the head dimension.

    Before: ``weight * to(x32 * rsqrt(mean(x32 ** 2, -1, True) + eps), dtype)``
    After: ``edgepass.rms_norm(x, weight, eps)``

    Refuses when: eps is computed; the result has another dtype than the input; the weight is not
    one number a channel of the last dimension; the mean is taken in 16 bits; 1 is added to a
    weight that is no constant.

    Numerics: the same float32 steps, 120 dB or better; in 16 bits the product with the weight is
    rounded once, where Llama's spelling rounds twice.

    Backends: all.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "casts to the same dtype would be taken for the norm's own"),
    )
    agreement_db: ClassVar[float] = 100.0

    def rules(self) -> Sequence[RewriteRule]:
        return (ComposedRmsNorm(), AtenRmsNorm())
