"""Rules that remove the guards that export adds to a program."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match
from edgepass.passes.pattern import ops
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor
from edgepass.passes.targets import argument, has_parameter, render_value

aten = ops("aten")


class DropMetadataAssertion(RewriteRule):
    """``_assert_tensor_metadata`` of a tensor whose metadata is known to be that."""

    name = "drop-metadata-assertion"

    def pattern(self, x: Any) -> Any:
        return aten._assert_tensor_metadata(x, ...)

    def check(self, match: Match) -> Refusal | None:
        fake = fake_tensor(match.x)
        if fake is None:
            return Refusal(f"nothing is known of {render_value(match.x)}", match.anchor)
        for name in ("dtype", "device", "layout"):
            if not has_parameter(match.anchor.target, name):
                continue
            wanted, got = argument(match.anchor, name), getattr(fake, name)
            if wanted is not None and wanted != got:
                return Refusal(f"{match.x.name} has {name}={got}, asserted {wanted}", match.x)
        return None

    def rewrite(self, match: Match, editor: Editor) -> Mapping[Node, Node]:
        editor.remove(match.anchor)
        return {}


class DropSymbolAssertion(RewriteRule):
    """``_assert_scalar`` and ``sym_constrain_range*`` on sizes of the inputs.

    Those are held by the program's range constraints. A symbol that the program itself computes
    (``u0``, from ``item()``) has no other guard: its assertions stay.
    """

    name = "drop-symbol-assertion"

    def pattern(self, condition: Any) -> Any:
        constrain = aten.sym_constrain_range | aten.sym_constrain_range_for_size
        return (aten._assert_scalar | constrain)(condition, ...)

    def check(self, match: Match) -> Refusal | None:
        unbacked = _unbacked_symbols(match.condition)
        if unbacked:
            return Refusal(f"it guards {unbacked[0]}, which the program computes", match.anchor)
        return None

    def rewrite(self, match: Match, editor: Editor) -> Mapping[Node, Node]:
        editor.remove(match.anchor)
        return {}


def _unbacked_symbols(condition: Any) -> list[str]:
    value = condition.meta.get("val") if isinstance(condition, Node) else condition
    if not isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return []
    return sorted(str(symbol) for symbol in free_unbacked_symbols(value))
