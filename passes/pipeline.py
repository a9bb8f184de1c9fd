"""An ordered list of passes: checked when it is built, measured and verified when it runs."""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from edgepass.ops.errors import PassError
from edgepass.passes.graph_pass import GraphPass, NoMatch
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog
from edgepass.passes.verification import Snapshot

DUMP_VARIABLE = "EDGEPASS_DUMP_GRAPHS"


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its log, its seconds, and the number of nodes before and after."""

    name: str
    log: RewriteLog
    seconds: float
    nodes_before: int
    nodes_after: int


@dataclass
class PipelineReport:
    """The reports of the passes, in the order in which they ran."""

    passes: list[PassReport] = field(default_factory=list)

    def __getitem__(self, name: str) -> PassReport:
        for report in self.passes:
            if report.name == name:
                return report
        known = ", ".join(report.name for report in self.passes)
        raise PassError(f"no report of pass={name}: the pipeline ran {known}")

    def never_applied(self) -> list[str]:
        """Return the rules that changed nothing, as ``pass/rule``."""
        return [
            f"{report.name}/{rule}"
            for report in self.passes
            for rule, count in report.log.counts.items()
            if not count.applied
        ]


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten program and the report of how it was made."""

    program: ExportedProgram
    report: PipelineReport


class Pipeline:
    """Passes in the order in which they run.

    Raises PassError, with every violation in one message, if the list breaks an order that a pass
    declares, names a pass twice, or lacks a required one.
    """

    def __init__(self, passes: Sequence[GraphPass]) -> None:
        self.passes = tuple(passes)
        violations = _order_violations(self.passes)
        if violations:
            raise PassError(f"pipeline={self.names} is out of order: " + "; ".join(violations))

    @property
    def names(self) -> list[str]:
        """The names of the passes, in order."""
        return [each.name for each in self.passes]

    def without(self, *names: str) -> "Pipeline":
        """Return the pipeline with some passes removed; the others keep their order.

        Raises PassError for an unknown name, or if another pass requires one of these.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise PassError(f"cannot remove pass={unknown[0]}: the pipeline has {self.names}")
        return Pipeline([each for each in self.passes if each.name not in names])

    def run(
        self,
        exported: ExportedProgram,
        *,
        verify: bool = False,
        sample_inputs: tuple[Any, ...] | None = None,
    ) -> PipelineResult:
        """Rewrite a copy of ``exported``; the program given is not changed.

        With ``verify`` the program runs on ``sample_inputs`` before and after each pass, on fresh
        copies of its mutable buffers, and the contracts of each pass are checked.
        Raises VerificationError naming the first pass whose outputs differ, PassError naming the
        contract that does not hold. ``EDGEPASS_DUMP_GRAPHS=<folder>`` writes the graph after each
        pass.
        """
        program = WorkingProgram(exported)
        report = self.apply(program, verify=verify, sample_inputs=sample_inputs)
        return PipelineResult(program.to_exported(), report)

    def apply(
        self,
        program: WorkingProgram,
        *,
        verify: bool = False,
        sample_inputs: tuple[Any, ...] | None = None,
    ) -> PipelineReport:
        """Run the passes on a working program in place; see ``run``."""
        if verify and sample_inputs is None:
            raise PassError("verify=True needs sample_inputs: give one tuple of example inputs")
        report = PipelineReport()
        with _collection_paused():
            self._run_all(program, report, verify, sample_inputs)
        return report

    def _run_all(
        self,
        program: WorkingProgram,
        report: PipelineReport,
        verify: bool,
        sample_inputs: tuple[Any, ...] | None,
    ) -> None:
        for index, each in enumerate(self.passes):
            _check_contracts(each, "requires", each.requires, program)
            before = Snapshot(program, sample_inputs) if verify and sample_inputs else None
            report.passes.append(_run_timed(each, program))
            dumped = _dump(program, index, each.name)
            _check_contracts(each, "ensures", each.ensures, program)
            if before is not None:
                replacements = report.passes[-1].log.replacements
                before.compare(program, each, replacements, dumped or _dump_hint())


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the garbage collector: it would walk the whole graph again and again as nodes come."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _run_timed(each: GraphPass, program: WorkingProgram) -> PassReport:
    nodes_before, started = len(program.graph.nodes), time.perf_counter()
    log = each.run(program)
    seconds = time.perf_counter() - started
    return PassReport(each.name, log, seconds, nodes_before, len(program.graph.nodes))


def _order_violations(passes: Sequence[GraphPass]) -> list[str]:
    names = [each.name for each in passes]
    found = [f"{name} is listed twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for position, each in enumerate(passes):
        for relation, orders in (("after", each.after), ("before", each.before)):
            for order in orders:
                if order.other not in names:
                    if order.required:
                        found.append(f"{each.name} needs {order.other}: {order.reason}")
                    continue
                other = names.index(order.other)
                if (other > position) is (relation == "after"):
                    found.append(f"{each.name} must come {relation} {order.other}: {order.reason}")
    return found


def _check_contracts(
    each: GraphPass, kind: str, contracts: Sequence[NoMatch], program: WorkingProgram
) -> None:
    for contract in contracts:
        node = contract.first_violation(program)
        if node is not None:
            raise PassError(
                f"pass={each.name} {kind} that {contract.sentence}: found {node.format_node()}"
            )


def _dump(program: WorkingProgram, index: int, name: str) -> str | None:
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder:
        return None
    path = Path(folder) / f"{index:02d}-{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(program.graph) + "\n")
    return f"the graph is in {path}"


def _dump_hint() -> str:
    return f"set {DUMP_VARIABLE}=<folder> to write the graph after each pass"
