"""Editing a private copy of a program for Vulkan: nodes that carry their values and origins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_arg

from edgepass.ops.errors import ProgramError
from edgepass.passes.program import WorkingProgram

# Where a node came from, which a rewrite hands on. `from_node` is absent on purpose: every
# re-trace of a later pass copies that chain and makes it longer (2 of 24 s at 8 layers).
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")

# In a node's `custom`: it stays outside every delegate. No new node takes that over from another.
OUTSIDE = "edgepass_outside_vulkan"


class GraphEditor:
    """Adds calls and constants to a :class:`WorkingProgram`, each with its fake value."""

    def __init__(self, program: WorkingProgram) -> None:
        mode = detect_fake_mode([node.meta.get("val") for node in program.placeholders])
        if mode is None:
            raise ProgramError(
                f"no tensor values: got a program of {len(program.graph.nodes)} nodes without "
                "them; accepted are programs of torch.export.export"
            )
        self.program = program
        self.graph = program.graph
        self.fake_mode = mode

    def constant(self, node: Any) -> torch.Tensor | None:
        """Return the tensor of a constant or buffer, None for anything else."""
        tensor = self.program.constant(node)
        return None if tensor is None else tensor.detach()

    def required_constant(self, node: Any) -> torch.Tensor:
        """Return the tensor of a constant or buffer. Raises ProgramError for anything else."""
        return self.program.required_constant(node).detach()

    def constant_name(self, node: Any) -> str:
        """Return the qualified name of a constant, ``""`` for anything else."""
        name = self.program.qualified_name(node) if isinstance(node, Node) else None
        return name or ""

    def is_user_input(self, node: Any) -> bool:
        """Tell whether the node is an input that the caller of the program passes."""
        is_placeholder = isinstance(node, Node) and node.op == "placeholder"
        return is_placeholder and not self.program.is_constant(node)

    def first_call(self) -> Node:
        """Return the first node that is not an input of the graph."""
        return next(node for node in self.graph.nodes if node.op != "placeholder")

    def add_constant(self, name: str, tensor: torch.Tensor) -> Node:
        """Add ``tensor`` as a buffer called ``name`` (made unique) and return its placeholder."""
        return self.program.add_constant(name, tensor)

    def derive(
        self, source: Node, kind: str, key: Any, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Node:
        """Return the constant that ``change`` makes of the constant ``source``, made once."""

        def compute() -> torch.Tensor:
            return change(self.required_constant(source))

        name = f"{self.constant_name(source)}_{kind}"
        return self.program.derive_constant(("vulkan", kind, source, key), name, compute)

    def call(self, target: Any, *args: Any, like: Node, val: Any = None) -> Node:
        """Add a call at the graph's insertion point, with the provenance of ``like``.

        ``val`` is the value of the call if it is known; otherwise the target is run on the values
        of its arguments.
        """
        node = self.graph.call_function(target, args)
        node.meta = {key: like.meta[key] for key in _PROVENANCE if key in like.meta}
        if node.meta.get("custom"):
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != OUTSIDE}
        node.meta["val"] = self.evaluate(target, args) if val is None else val
        bindings = compute_unbacked_bindings(self.fake_mode.shape_env, node.meta["val"])
        if bindings:
            node.meta["unbacked_bindings"] = bindings
        return node

    def replace(self, node: Node, new: Node) -> None:
        """Put ``new`` in the place of ``node``, which is erased."""
        node.replace_all_uses_with(new, propagate_meta=False)
        self.graph.erase_node(node)

    def evaluate(self, target: Any, args: Iterable[Any]) -> Any:
        """Run ``target`` on the fake values of ``args``."""
        values = map_arg(tuple(args), lambda node: node.meta["val"])
        with self.fake_mode, torch.no_grad():
            return target(*values)

    def build(self) -> ExportedProgram:
        """Return the program of the edited graph, without what nothing uses any more."""
        self.graph.eliminate_dead_code()
        self.program.remove_unused_constants()
        for node in self.graph.nodes:
            node.meta.pop("from_node", None)
        self._keep_output_names()
        self.graph.lint()
        return self.program.to_exported()

    def _keep_output_names(self) -> None:
        """Give a node that took an output's place its name: the signature goes by names."""
        outputs = self.graph.output_node().args[0]
        for spec, node in zip(self.program.signature.output_specs, outputs, strict=True):
            name = getattr(spec.arg, "name", None)
            if isinstance(node, Node) and node.op != "placeholder" and name is not None:
                node.name = name
