"""A working copy of an exported program whose graph and constants the passes may change."""

import copy
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node

from edgepass.ops.errors import ProgramError
from edgepass.passes.aliasing import MutationTable, has_effect
from edgepass.passes.targets import is_call, render_value

INNER_TENSOR = "export.access_subclass_inner_tensor"
_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class WorkingProgram:
    """An exported program under rewriting.

    The graph, the signature and the tables of constants are copies; the tensors are shared with
    the user's program, which is never changed. ``to_exported`` makes a new program of it.

    Raises ProgramError if ``exported`` is not an ExportedProgram or was lowered already.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        if not isinstance(exported, ExportedProgram):
            raise ProgramError(
                f"cannot rewrite program={type(exported).__name__}: "
                "expected the ExportedProgram that torch.export.export returns"
            )
        for node in exported.graph.nodes:
            if is_call(node, "higher_order.executorch_call_delegate"):
                raise ProgramError(
                    f"cannot rewrite node={node.name}: the program is lowered already, "
                    "give the one that torch.export.export returned"
                )
        self._origin = exported
        self.graph = copy.deepcopy(exported.graph)
        self._module: GraphModule | None = None
        self._state: dict[str, Any] = dict(exported.state_dict)
        self._constants: dict[str, Any] = dict(exported.constants)
        # By node, because copying may rename: a placeholder `input` becomes `input_1`.
        specs = exported.graph_signature.input_specs
        self._inputs: dict[Node, InputSpec] = dict(zip(self.placeholders, specs, strict=True))
        self._outputs = list(exported.graph_signature.output_specs)
        self._derived: dict[Hashable, Node] = {}
        self._pending: dict[Node, Callable[[], torch.Tensor]] = {}
        self._fake_mode = detect_fake_mode([each.meta.get("val") for each in self.placeholders])
        self._after_constants: Node | None = None
        self.find_mutations()

    @property
    def module(self) -> GraphModule:
        """The graph as a module that can run; its Python code is that of the present graph."""
        if self._module is None:
            self._module = GraphModule(self._origin.graph_module, self.graph)
            self._module.meta = dict(self._origin.graph_module.meta)
        else:
            self._module.recompile()
        return self._module

    @property
    def placeholders(self) -> list[Node]:
        """Every input of the graph: constants first, then the user's inputs."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def user_inputs(self) -> list[Node]:
        """The placeholders that a caller passes, in order."""
        return [node for node in self.placeholders if not self.is_constant(node)]

    @property
    def signature(self) -> ExportGraphSignature:
        """The graph's signature as it is now."""
        specs = [_renamed(self._inputs[node], node) for node in self.placeholders]
        return ExportGraphSignature(input_specs=specs, output_specs=self._output_specs())

    def _output_specs(self) -> list[OutputSpec]:
        """The output specs under the names of the nodes that the graph returns now."""
        returned = self.graph.output_node().args[0]
        pairs = zip(self._outputs, returned, strict=True)
        return [_renamed(spec, node) if isinstance(node, Node) else spec for spec, node in pairs]

    def is_constant(self, node: Node) -> bool:
        """Tell whether ``node`` is a parameter, buffer or lifted tensor constant."""
        spec = self._inputs.get(node)  # has placeholders only
        return spec is not None and spec.kind in _CONSTANT_KINDS

    def qualified_name(self, node: Node) -> str | None:
        """Return the module path of a constant (``model.layers.0.q_proj.weight``)."""
        if is_call(node, INNER_TENSOR):
            return f"{self.qualified_name(node.args[0])}_{node.args[1]}"
        return self._inputs[node].target if self.is_constant(node) else None

    def _target(self, node: Node) -> str:
        target = self._inputs[node].target
        if target is None:
            raise ProgramError(
                f"the constant placeholder={node.name} has no target in its signature"
            )
        return target

    def constant(self, node: Any) -> torch.Tensor | None:
        """Return the tensor behind a constant, or None if ``node`` is computed or is an input.

        Looks through ``export.access_subclass_inner_tensor`` into a quantized parameter. A buffer
        that the program changes is no constant: ask ``mutable_constants``.
        """
        if not isinstance(node, Node):
            return None
        if node.op != "placeholder":
            outer = self.constant(node.args[0]) if is_call(node, INNER_TENSOR) else None
            return None if outer is None else getattr(outer, node.args[1])
        if not self.is_constant(node):
            return None
        if node in self._pending:
            self.complete_constants()
        target = self._target(node)
        found = self._state.get(target)
        return self._constants.get(target) if found is None else found

    def required_constant(self, node: Any) -> torch.Tensor:
        """Return the tensor behind a constant. Raises ProgramError if it is none."""
        tensor = self.constant(node)
        if tensor is None:
            raise ProgramError(
                f"no constant: got {render_value(node)}, accepted are parameters and buffers"
            )
        return tensor

    def number(self, value: Any) -> float | int | None:
        """Return a Python number, or the value of a constant with one element, else None."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        tensor = self.constant(value)
        if tensor is None or tensor.numel() != 1 or value in self.mutable_constants():
            return None
        return tensor.item()

    def find_mutations(self) -> MutationTable:
        """Analyse anew what the graph changes in place; ``mutable_constants`` goes by it."""
        self._mutations = MutationTable(self.graph)
        self._mutable = self._find_mutable()
        return self._mutations

    @property
    def mutations(self) -> MutationTable:
        """What the graph changed in place when ``find_mutations`` was last called."""
        return self._mutations

    def mutable_constants(self) -> set[Node]:
        """Return the buffers that the program changes, in place or through its signature."""
        return self._mutable

    def _find_mutable(self) -> set[Node]:
        changed = self._mutations.changed_roots()
        targets = {spec.target for spec in self._outputs if spec.kind is OutputKind.BUFFER_MUTATION}
        if not changed and not targets:
            return set()
        return {
            node
            for node in self.placeholders
            if self.is_constant(node) and (node in changed or self._inputs[node].target in targets)
        }

    def add_constant(
        self, qualified_name: str, tensor: torch.Tensor, like: Node | None = None
    ) -> Node:
        """Add a buffer to the program and return its placeholder.

        ``qualified_name`` is made unique with a number if it is taken. The tensor is shared.
        ``like`` is a node whose fake value describes the tensor, which saves making one.
        """
        node = self._add_buffer(qualified_name)
        node.meta["val"] = self._fake(tensor) if like is None else like.meta["val"]
        self._state[self._target(node)] = tensor.detach()
        return node

    def _add_buffer(self, qualified_name: str) -> Node:
        """Add the placeholder of a buffer that has no tensor yet."""
        target = self._unused(qualified_name)
        name = "b_" + target.replace(".", "_")
        with self.graph.inserting_before(self._end_of_constants()):
            node = self.graph.create_node("placeholder", name, name=name)
        self._state[target] = None
        argument = TensorArgument(name=node.name)
        self._inputs[node] = InputSpec(InputKind.BUFFER, argument, target, persistent=True)
        return node

    def derive_constant(
        self,
        key: Hashable,
        qualified_name: str,
        compute: Callable[[], torch.Tensor],
        like: Node | None = None,
        *,
        later: bool = False,
    ) -> Node:
        """Return the constant made for ``key`` before, or compute and add it now.

        ``key`` names the sources and what is made of them, as in ``("int4", weight_node)``: a
        weight shared by two linears is packed once. With ``later`` the tensor and its fake value
        are made by ``complete_constants``.
        """
        node = self._derived.get(key)
        if node is not None and not node._erased:
            return node
        if later:
            node = self._add_buffer(qualified_name)
            self._pending[node] = compute
        else:
            node = self.add_constant(qualified_name, compute(), like)
        self._derived[key] = node
        return node

    def complete_constants(self) -> None:
        """Make the tensors that were put off, one after the other.

        Nothing else runs in between, so that code and tables stay in the processor's caches.
        """
        pending, self._pending = self._pending, {}
        for node, compute in pending.items():
            tensor = compute()
            node.meta["val"] = self._fake(tensor)
            self._state[self._target(node)] = tensor.detach()

    def replace_constant(self, node: Node, tensor: torch.Tensor) -> None:
        """Give a constant another content, as of another dtype; the user's tensor stays."""
        target = self._target(node)
        table = self._state if target in self._state else self._constants
        wrapped = isinstance(table[target], torch.nn.Parameter)
        tensor = tensor.detach()
        table[target] = torch.nn.Parameter(tensor, requires_grad=False) if wrapped else tensor
        node.meta["val"] = self._fake(tensor)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake value of a constant.

        Each constant has its own: retraced, two caches of one value would be one buffer.
        """
        if self._fake_mode is None:
            return tensor
        shape = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
        return FakeTensor(self._fake_mode, shape, tensor.device)

    def remove_dead_calls(self) -> int:
        """Erase calls without users and without effects, and return how many.

        The constants that only they used stay: see ``remove_unused_constants``.
        """
        removed = 0
        for node in reversed(self.graph.nodes):
            if not node.users and not has_effect(node):
                self.graph.erase_node(node)
                removed += 1
        return removed

    def remove_unused_constants(self) -> int:
        """Drop constants without users, and return how many. The user's inputs always stay."""
        unused = [node for node in self._inputs if not node.users and self.is_constant(node)]
        if not unused:
            return 0
        targets = {self._target(node) for node in unused}
        for node in unused:
            del self._inputs[node]
            self._pending.pop(node, None)
            self.graph.erase_node(node)
        targets.difference_update(spec.target for spec in self._inputs.values())
        for target in targets:
            self._state.pop(target, None)
            self._constants.pop(target, None)
        return len(unused)

    def merge_equal_constants(self) -> int:
        """Let equal constants share one placeholder, and return how many were merged.

        The others stay, without users: see ``remove_unused_constants``.
        Buffers that the program changes are never merged: all empty caches are equal.
        """
        mutable = self.mutable_constants()
        kept: dict[Hashable, list[tuple[Node, torch.Tensor]]] = {}
        merged = 0
        for node in self.placeholders:
            tensor = self.constant(node)
            if tensor is None or node in mutable or type(tensor) not in _PLAIN:
                continue
            if tensor.element_size() not in _INTEGERS or not tensor.is_cpu:
                continue
            twins = kept.setdefault(_fingerprint(tensor), [])
            for twin, other in twins:
                if tensor.nbytes <= _SAMPLE or _same_bits(other, tensor):
                    node.replace_all_uses_with(twin)
                    merged += 1
                    break
            else:
                twins.append((node, tensor))
        return merged

    def to_exported(self) -> ExportedProgram:
        """Return a new ExportedProgram with the present graph and constants.

        Its mutable buffers are its own: running it leaves the given program's caches alone.
        """
        self.complete_constants()
        self.find_mutations()
        own = {self._target(node) for node in self._mutable}
        return ExportedProgram(
            root=self._origin.graph_module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=_with_copies(self._state, own),
            range_constraints=dict(self._origin.range_constraints),
            module_call_graph=copy.copy(self._origin.module_call_graph),
            example_inputs=self._origin.example_inputs,
            constants=_with_copies(self._constants, own),
            verifiers=self._origin.verifiers,
        )

    def _unused(self, name: str) -> str:
        number, candidate = 0, name
        while candidate in self._state or candidate in self._constants:
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def _end_of_constants(self) -> Node:
        """Return the node before which constants go: the first that is none."""
        end = self._after_constants
        if end is None or end._erased:
            end = next(node for node in self.graph.nodes if not self.is_constant(node))
            self._after_constants = end
        return end


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SAMPLE = 512  # bytes up to which a fingerprint is the whole tensor
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _renamed(spec: Any, node: Node) -> Any:
    """Return an input or output spec with the name that the node has now."""
    if not hasattr(spec.arg, "name"):
        return spec
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name))


def _with_copies(tensors: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {k: v.detach().clone() if k in names else v for k, v in tensors.items()}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor as integers, which compare as bits do."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _fingerprint(tensor: torch.Tensor) -> Hashable:
    """Return a cheap key that equal tensors share: form, and the bytes or a sample of them."""
    data = _bits(tensor).numpy().ravel()
    if data.nbytes > _SAMPLE:
        data = data[:: data.size // 16]
    return (tensor.dtype, tensor.shape, data.tobytes())


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    return torch.equal(_bits(left), _bits(right))
