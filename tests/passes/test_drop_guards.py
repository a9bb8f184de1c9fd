"""Guards that hold are dropped, guards that the program needs stay; parameters are unwrapped."""

import torch
from torch.export import Dim

from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.drop_guards import DropMetadataAssertion
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import Rewriter
from tests.passes.programs import count, export, find, reasons, run_passes

X = torch.randn(4, 3)


def test_a_metadata_assertion_that_holds_goes() -> None:
    exported = export(lambda a: a.to(torch.float32).to(torch.float16), (X,))
    assert count(exported, "aten._assert_tensor_metadata") > 0
    program, log = run_passes([Canonicalize()], exported, (X,))
    assert count(program, "aten._assert_tensor_metadata") == 0
    assert log.counts["drop-metadata-assertion"].refused == 0


def test_a_metadata_assertion_that_does_not_hold_stays() -> None:
    exported = export(lambda a: a.to(torch.float16), (X,))
    (assertion,) = find(exported, "aten._assert_tensor_metadata")
    assertion.kwargs = {**assertion.kwargs, "dtype": torch.int8}
    log = Rewriter([DropMetadataAssertion()]).apply(WorkingProgram(exported))
    assert reasons(log, "drop-metadata-assertion") == [
        "inputs_0 has dtype=torch.float32, asserted torch.int8"
    ]


def test_an_assertion_on_an_input_size_goes() -> None:
    def forward(a):
        torch._check(a.shape[0] > 2)
        return a + 1

    exported = export(forward, (X,), ({0: Dim("n", min=3, max=9)},))
    with exported.graph.inserting_before(exported.graph.output_node()):
        source = next(n for n in exported.graph.nodes if n.op == "placeholder")
        size = exported.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
        size.meta["val"] = source.meta["val"].shape[0]
        exported.graph.call_function(
            torch.ops.aten.sym_constrain_range.default, (size,), {"min": 3}
        )
    program, log = run_passes([Canonicalize()], exported, (X,))
    assert log.counts["drop-symbol-assertion"].applied == 1
    assert count(program, "aten.sym_constrain_range", "aten.sym_size") == 0


def test_an_assertion_on_a_computed_number_stays() -> None:
    def forward(a, position):
        start = position.item()
        torch._check(start >= 0)
        torch._check(start < 3)
        return a.narrow(0, start, 1)

    inputs = (X, torch.tensor([1]))
    program, log = run_passes([Canonicalize()], export(forward, inputs), inputs)
    assert count(program, "aten._assert_scalar", "aten.sym_constrain_range_for_size") > 0
    assert all(
        "which the program computes" in each for each in reasons(log, "drop-symbol-assertion")
    )
