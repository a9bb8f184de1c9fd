"""The working copy: the user's program stays as it is, constants come and go."""

import pytest
import torch
from torch import nn

from edgepass.ops.errors import ProgramError
from edgepass.passes.program import WorkingProgram
from tests.passes.programs import export

X = torch.randn(2, 3)


class Tied(nn.Module):
    """Two equal parameters, two equal caches, one constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.second = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("cache_a", torch.zeros(2, 3))
        self.register_buffer("cache_b", torch.zeros(2, 3))

    def forward(self, x):
        self.cache_a.add_(x)
        self.cache_b.add_(2 * x)
        return x * self.first + self.second + self.cache_a + self.cache_b


def working(module=None) -> WorkingProgram:
    return WorkingProgram(export(module or Tied(), (X,)))


def constant_named(program: WorkingProgram, name: str):
    return next(n for n in program.placeholders if program.qualified_name(n) == name)


def test_the_given_program_is_not_changed() -> None:
    exported = export(Tied(), (X,))
    before = (str(exported.graph), list(exported.state_dict), str(exported.graph_signature))
    program = WorkingProgram(exported)
    program.merge_equal_constants()
    program.add_constant("extra", torch.ones(1))
    program.to_exported()
    assert before == (str(exported.graph), list(exported.state_dict), str(exported.graph_signature))


def test_tensors_are_shared_not_copied() -> None:
    exported = export(Tied(), (X,))
    program = WorkingProgram(exported)
    held = program.constant(constant_named(program, "first"))
    assert held.data_ptr() == exported.state_dict["first"].data_ptr()


def test_equal_constants_become_one_but_caches_stay_apart() -> None:
    exported = export(Tied(), (X,))
    program = WorkingProgram(exported)
    assert program.merge_equal_constants() == 1
    assert program.remove_unused_constants() == 1
    names = {program.qualified_name(n) for n in program.placeholders} - {None}
    assert names == {"first", "cache_a", "cache_b"}
    rewritten = program.to_exported()
    assert torch.equal(exported.module()(X), rewritten.module()(X))


def test_running_the_result_leaves_the_given_caches_alone() -> None:
    exported = export(Tied(), (X,))
    WorkingProgram(exported).to_exported().module()(X)
    assert not exported.state_dict["cache_a"].any()


def test_zeros_of_either_sign_are_not_equal() -> None:
    module = Tied()
    module.second.data = module.first.data.clone()
    module.second.data[0, 0] = -0.0
    assert working(module).merge_equal_constants() == 0


def test_mutable_buffers_are_known() -> None:
    program = working()
    names = {program.qualified_name(node) for node in program.mutable_constants()}
    assert names == {"cache_a", "cache_b"}


def test_an_added_constant_runs_and_is_in_the_signature() -> None:
    program = working()
    new = program.add_constant("layers.0.extra", torch.full((2, 3), 5.0))
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], new))
    total.meta["val"] = output.args[0][0].meta["val"]
    output.args[0][0].replace_all_uses_with(total, delete_user_cb=lambda user: user is output)
    exported = program.to_exported()
    assert "layers.0.extra" in exported.state_dict
    assert exported.graph_signature.buffers[-1] == "layers.0.extra"
    assert torch.equal(exported.module()(X), export(Tied(), (X,)).module()(X) + 5)


def test_names_taken_are_numbered() -> None:
    program = working()
    nodes = [program.add_constant("first", torch.ones(1)) for _ in range(2)]
    assert [program.qualified_name(node) for node in nodes] == ["first_1", "first_2"]


def test_a_derived_constant_is_made_once() -> None:
    program, made = working(), []

    def make():
        made.append(1)
        return torch.ones(2)

    first = program.derive_constant(("int4", "w"), "w_packed", make)
    assert program.derive_constant(("int4", "w"), "w_packed", make) is first
    assert len(made) == 1


def test_a_constant_put_off_is_made_when_it_is_asked_for() -> None:
    program, made = working(), []

    def make():
        made.append(1)
        return torch.full((2,), 7, dtype=torch.int8)

    node = program.derive_constant("late", "late", make, later=True)
    assert program.derive_constant("late", "late", make, later=True) is node
    assert program.qualified_name(program.add_constant("late", X)) == "late_1"
    assert not made
    assert torch.equal(program.constant(node), torch.full((2,), 7, dtype=torch.int8))
    assert (node.meta["val"].shape, node.meta["val"].dtype) == ((2,), torch.int8)
    program.complete_constants()
    assert len(made) == 1


def test_constants_put_off_are_in_the_exported_program_and_unused_ones_are_not_made() -> None:
    program = WorkingProgram(export(lambda a: a + 1, (X,)))
    used = program.derive_constant("used", "used", lambda: torch.full((2, 3), 5.0), later=True)
    program.derive_constant("unused", "unused", lambda: pytest.fail("made"), later=True)
    (add,) = (node for node in program.graph.nodes if node.op == "call_function")
    add.update_arg(1, used)
    assert program.remove_unused_constants() == 1
    assert torch.equal(program.to_exported().module()(X), X + 5)


def test_unused_constants_go_and_user_inputs_stay() -> None:
    program = WorkingProgram(export(lambda a, b: a + 1, (X, X + 1)))
    program.add_constant("unused", torch.ones(3))
    assert program.remove_unused_constants() == 1
    assert len(program.user_inputs) == 2
    assert "unused" not in program.to_exported().state_dict


def test_numbers_are_read_from_constants_of_one_element() -> None:
    program = WorkingProgram(export(lambda a, eps: a + eps, (X,), eps=torch.tensor([0.5])))
    (node,) = [n for n in program.placeholders if program.is_constant(n)]
    assert program.number(node) == 0.5
    assert program.number(3) == 3
    assert program.number(True) is None
    assert program.number(program.user_inputs[0]) is None


def test_what_is_no_exported_program_is_refused() -> None:
    with pytest.raises(ProgramError, match="program=Tied: expected the ExportedProgram"):
        WorkingProgram(Tied())
