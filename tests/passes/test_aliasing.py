"""Which values share memory with something changed in place."""

import torch

from edgepass.passes.aliasing import MutationTable, has_effect
from tests.passes.programs import export, find

X = torch.randn(2, 3)


def table(function, **buffers):
    exported = export(function, (X,), **buffers)
    return exported, MutationTable(exported.graph)


def _views(a, cache):
    row = cache.view(6).unsqueeze(0)
    cache.index_copy_(0, torch.tensor([0]), a[:1])
    return row + 1, a.exp()


def test_views_of_a_changed_buffer_are_changed() -> None:
    exported, mutations = table(_views, cache=torch.zeros(2, 3))
    (row,), (exp,) = find(exported, "aten.unsqueeze"), find(exported, "aten.exp")
    (write,) = find(exported, "aten.index_copy_")
    assert mutations.is_changed(row)
    assert not mutations.is_changed(exp)
    assert mutations.root(write) is mutations.root(row)


def test_writes_are_found_between_two_nodes() -> None:
    exported, mutations = table(_views, cache=torch.zeros(2, 3))
    (row,), (exp,) = find(exported, "aten.unsqueeze"), find(exported, "aten.exp")
    (write,) = find(exported, "aten.index_copy_")
    assert mutations.write_between(row, row, exp) is write
    assert mutations.write_between(row, write, exp) is None


def test_a_view_made_after_the_analysis_is_known() -> None:
    exported, mutations = table(_views, cache=torch.zeros(2, 3))
    (row,) = find(exported, "aten.unsqueeze")
    with exported.graph.inserting_after(row):
        new = exported.graph.call_function(torch.ops.aten.squeeze.dim, (row, 0))
    assert mutations.is_changed(new)


def test_a_program_without_writes_has_an_empty_table() -> None:
    _, mutations = table(lambda a: a.view(6))
    assert not mutations


def test_outputs_of_a_split_view_its_input() -> None:
    def forward(a, cache):
        first, _ = cache.split(1)
        first.add_(1)
        return cache + a

    exported, mutations = table(forward, cache=torch.zeros(2, 3))
    assert mutations.is_changed(find(exported, "aten.split")[0])


def test_effects() -> None:
    exported, _ = table(_views, cache=torch.zeros(2, 3))
    (write,), (exp,) = find(exported, "aten.index_copy_"), find(exported, "aten.exp")
    assert has_effect(write)
    assert not has_effect(exp)
