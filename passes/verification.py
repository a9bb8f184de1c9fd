"""Runs a program before and after a pass and compares every value that the pass rewrote.

Each rewritten value is compared, and then set to the original, before the run goes on. So a
difference in the last bit, which the next activation quantization would blow up to a whole step,
cannot hide or fake a wrong rewrite further down.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from edgepass.ops.errors import InvalidArgumentError, VerificationError
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import Replacement

if TYPE_CHECKING:
    from edgepass.passes.graph_pass import GraphPass


def signal_to_noise_db(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Return the ratio of signal to error in dB: infinity if equal, -infinity if not comparable.

    Both of the same shape, any dtype; NaN and infinity must stand at the same places.
    """
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return -math.inf
    if torch.equal(reference, value):
        return math.inf
    wide, other = reference.detach().double(), value.detach().double()
    finite = wide.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return -math.inf
    if not torch.equal(wide[~finite].nan_to_num(7.0), other[~finite].nan_to_num(7.0)):
        return -math.inf
    noise = (wide[finite] - other[finite]).square().sum().item()
    signal = wide[finite].square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class Snapshot:
    """A program as it was before a pass, with the inputs to run it on."""

    def __init__(self, program: WorkingProgram, sample_inputs: tuple[Any, ...]) -> None:
        self._inputs = pytree.tree_leaves(sample_inputs)
        wanted = len(program.user_inputs)
        if len(self._inputs) != wanted:
            raise InvalidArgumentError(
                f"got sample_inputs with {len(self._inputs)} values: the program takes {wanted}"
            )
        self._program = WorkingProgram(program.to_exported())

    def compare(
        self,
        program: WorkingProgram,
        graph_pass: "GraphPass",
        replacements: Sequence[Replacement],
        where_to_look: str,
    ) -> None:
        """Raise VerificationError if ``program`` differs by more than the pass allows."""
        old_names = {each.old_name for each in replacements}
        recorder = _Recorder(self._program, old_names)
        expected = recorder.run_on(self._inputs)
        checker = _Checker(program, _final(replacements), recorder.values, graph_pass)
        found = checker.run_on(self._inputs)
        for index, (before, after) in enumerate(zip(expected, found, strict=True)):
            checker.judge(before, after, f"output {index}")
        if checker.complaint is not None:
            raise VerificationError(
                f"pass={graph_pass.name} changed {checker.complaint}, expected at least "
                f"{graph_pass.agreement_db:g} dB; {where_to_look}"
            )


def _final(replacements: Sequence[Replacement]) -> dict[Node, list[Replacement]]:
    """Group the replacements by the node that stands in the graph after the pass."""
    later = {each.old_name: each for each in replacements}
    final: dict[Node, list[Replacement]] = {}
    for each in replacements:
        new = each.new
        while new._erased and new.name in later:
            new = later[new.name].new
        if not new._erased:
            final.setdefault(new, []).append(each)
    return final


class _Run(Interpreter):
    """Runs a working program on user inputs with private copies of its mutable buffers."""

    def __init__(self, program: WorkingProgram) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.program = program

    def run_on(self, user_inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs, and after them the mutable buffers as the run left them."""
        mutable = self.program.mutable_constants()
        given, arguments = iter(user_inputs), []
        buffers: dict[str, torch.Tensor] = {}
        for node in self.program.placeholders:
            if not self.program.is_constant(node):
                value = next(given)
                arguments.append(value.clone() if isinstance(value, torch.Tensor) else value)
            elif node in mutable:
                tensor = self.program.constant(node)
                assert tensor is not None, "a mutable buffer has a tensor"
                buffers[node.name] = tensor.detach().clone()
                arguments.append(buffers[node.name])
            else:
                arguments.append(self.program.constant(node))
        with torch.no_grad():
            outputs = pytree.tree_leaves(self.run(*arguments))
        return outputs + [buffers[name] for name in sorted(buffers)]


def run_program(program: WorkingProgram, user_inputs: Sequence[Any]) -> list[Any]:
    """Run ``program`` eagerly on flat inputs, its buffers untouched; return the user's outputs."""
    returned = len(pytree.tree_leaves(program.graph.output_node().args[0]))
    return _Run(program).run_on(user_inputs)[:returned]


class _Recorder(_Run):
    """Keeps the values that the pass is going to replace."""

    def __init__(self, program: WorkingProgram, names: set[str]) -> None:
        super().__init__(program)
        self._names = names
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            changes = self.program.mutations.is_changed(n)
            copied = pytree.tree_map_only(torch.Tensor, torch.clone, value) if changes else value
            self.values[n.name] = copied
        return value


class _Checker(_Run):
    """Compares each replaced value with the recorded one, then goes on with the recorded one."""

    def __init__(
        self,
        program: WorkingProgram,
        by_node: dict[Node, list[Replacement]],
        recorded: dict[str, Any],
        graph_pass: "GraphPass",
    ) -> None:
        super().__init__(program)
        self._by_node, self._recorded, self._pass = by_node, recorded, graph_pass
        self.complaint: str | None = None

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for each in self._by_node.get(n, ()):
            if each.old_name in self._recorded:
                before = self._recorded[each.old_name]
                self.judge(before, value, f"{each.old_name} (rule {each.rule})")
                value = before
        return value

    def judge(self, before: Any, after: Any, what: str) -> None:
        """Note the first difference beyond what the pass allows."""
        if self.complaint is not None:
            return
        left, right = pytree.tree_leaves(before), pytree.tree_leaves(after)
        for one, other in zip(left, right, strict=True):
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                agreement = signal_to_noise_db(one, other)
                if agreement < required_db(self._pass, one) and not _only_flips(
                    self._pass, one, other
                ):
                    self.complaint = f"{what}: {agreement:.1f} dB"
            elif one != other:
                self.complaint = f"{what}: {one!r} became {other!r}"


# Rounding once more or less in a 16-bit dtype alone costs this much.
_ROUNDING_DB = {torch.float16: 60.0, torch.bfloat16: 42.0}


def required_db(graph_pass: "GraphPass", value: torch.Tensor) -> float:
    """Return the agreement that a pass promises for a value of that dtype, in dB."""
    promised = graph_pass.agreement_db
    return (
        promised if math.isinf(promised) else min(promised, _ROUNDING_DB.get(value.dtype, promised))
    )


def _only_flips(graph_pass: "GraphPass", before: torch.Tensor, after: torch.Tensor) -> bool:
    """Tell whether few rows differ, each by no more than activations that round the other way."""
    bound = graph_pass.rounding_flip_db
    if bound is None or before.shape != after.shape or before.dim() == 0:
        return False
    rows = zip(before.flatten(0, -2), after.flatten(0, -2), strict=True) if before.dim() > 1 else []
    agreements = [signal_to_noise_db(*row) for row in rows]
    flipped = [each for each in agreements if each < required_db(graph_pass, before)]
    return min(flipped, default=0.0) >= bound and len(flipped) <= 1 + len(agreements) // 4
