"""Caches are found by what joins them, whatever the operator, and never by position."""

import pytest
import torch

from edgepass.ops.errors import EncodingError
from edgepass.passes.kv_pairs import kv_pairs_of

ROWS, CACHE, WHERE = torch.randn(1, 2, 4), torch.zeros(1, 6, 4), torch.tensor([2, 3])

JOINS = {
    "cat": lambda cache, rows, at: torch.cat([cache, rows], 1),
    "cat, rows first": lambda cache, rows, at: torch.cat([rows, cache], 1),
    "cat of a view": lambda cache, rows, at: torch.cat([cache.transpose(1, 2), rows.mT], 2),
    "index_copy": lambda cache, rows, at: torch.index_copy(cache, 1, at, rows),
    "index_put": lambda cache, rows, at: torch.ops.aten.index_put(cache, [None, at], rows),
    "slice_scatter": lambda cache, rows, at: torch.slice_scatter(cache, rows, 1, 2, 4),
}


def pairs(function, *inputs):
    class Model(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    program = torch.export.export(Model(), inputs, strict=False)
    graph = program.module(check_guards=False).graph
    outputs = list(graph.output_node().args[0])
    found = kv_pairs_of(graph)
    return [
        (list(graph.find_nodes(op="placeholder")).index(cache), outputs.index(out))
        for cache, _, out in found
    ]


@pytest.mark.parametrize("join", JOINS)
def test_new_rows_are_paired_with_their_cache(join) -> None:
    def model(cache, x, at):
        rows = x * 2
        return JOINS[join](cache, rows, at).sum(), rows + 0.0 * at[0], rows

    assert pairs(model, CACHE, ROWS, WHERE) == [(0, 2)]


@pytest.mark.parametrize("join", ["index_copy", "index_put", "slice_scatter"])
def test_a_whole_cache_that_is_returned_is_paired(join) -> None:
    def model(x, at, cache):
        whole = JOINS[join](cache, x.exp(), at)
        return whole.sum(), whole

    assert pairs(model, ROWS, WHERE, CACHE) == [(2, 1)]


def test_an_input_that_nothing_joins_is_no_cache() -> None:
    assert pairs(lambda x, y: (x + y, torch.cat([x.exp(), y.exp()], 1)), ROWS, ROWS.clone()) == []


def test_rows_of_another_shape_are_refused() -> None:
    def model(cache, x):
        rows = x.exp()
        return torch.cat([cache, rows], 1).sum(), rows.reshape(1, 4, 2)

    with pytest.raises(EncodingError, match=r"KV pair of different shapes: .* \[1, 6, 4\] and"):
        pairs(model, CACHE, ROWS)


def test_rows_of_two_outputs_are_ambiguous() -> None:
    def model(cache, x):
        rows = x.exp()
        return torch.cat([cache, rows], 1).sum(), rows, rows.mT

    with pytest.raises(EncodingError, match="ambiguous KV pair"):
        pairs(model, CACHE, ROWS)
