"""Views that change nothing, or that cancel; each near miss says why it stays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepass.passes.cancel_views import permutation
from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.targets import operator_name
from tests.passes.programs import count, export, find, reasons, run_passes

X = torch.randn(2, 3, 4)


def canonical(function, *inputs, **buffers):
    return run_passes([Canonicalize()], export(function, inputs, **buffers), inputs)


def operators(program) -> list[str]:
    nodes = program.graph.nodes
    return [operator_name(node.target) for node in nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a.view(2, 3, 4).exp(),
        lambda a: a.reshape(-1, 3, 4).exp(),
        lambda a: a.expand(2, 3, 4).exp(),
        lambda a: a[0:].exp(),
        lambda a: a.unsqueeze(0).unsqueeze(3).reshape(2, 3, 4).exp(),
        lambda a: a.flatten(1).unflatten(1, (3, 4)).exp(),
        lambda a: a.permute(0, 1, 2).exp(),
        lambda a: a.transpose(1, 1).exp(),
        lambda a: a.transpose(0, 2).permute(2, 1, 0).exp(),
    ],
)
def test_views_that_cancel_go(function) -> None:
    program, _ = canonical(function, X)
    assert operators(program) == ["aten.exp"]


def test_two_reshapes_become_one() -> None:
    program, log = canonical(lambda a: a.view(6, 4).view(3, 8).exp(), X)
    assert operators(program) == ["aten.view", "aten.exp"]
    assert log.counts["join-reshapes"].applied == 1


def test_reshapes_of_what_is_not_contiguous_stay() -> None:
    program, log = canonical(lambda a: a.transpose(0, 1).reshape(6, 4).reshape(3, 8).exp(), X)
    assert count(program, "aten.reshape") == 2
    assert reasons(log, "join-reshapes") == ["transpose is not contiguous"]


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a.view(torch.int32).view(6, 4) + 1,
        lambda a: a.view(6, 4).view(torch.int32) + 1,
        lambda a: a.view(torch.int16).view(4, 12) + 1,
        lambda a: a.view(6, 4).view(torch.int16) + 1,
    ],
)
def test_a_view_of_the_bits_is_no_reshape(function) -> None:
    program, log = canonical(function, X)
    assert operators(program) == ["aten.view", "aten.view", "aten.add"]
    assert reasons(log, "join-reshapes") == ["view or view_1 reads the bits as another dtype"]


def test_reshapes_beside_a_view_of_the_bits_are_joined() -> None:
    program, _ = canonical(lambda a: a.view(torch.int32).view(6, 4).view(3, 8) + 1, X)
    assert operators(program) == ["aten.view", "aten.view", "aten.add"]


def test_a_permutation_that_moves_stays() -> None:
    _, log = canonical(lambda a: a.permute(1, 2, 0).exp(), X)
    assert reasons(log, "cancel-permutations") == ["permute moves dimensions to [1, 2, 0]"]


def test_a_snapshot_of_a_cache_stays() -> None:
    def forward(a, cache):
        early = cache.t().reshape(6).reshape(3, 2).t()
        cache.add_(a)
        return early + cache

    x = torch.randn(2, 3)
    exported = export(forward, (x,), cache=torch.ones(2, 3))
    program, _ = run_passes([Canonicalize()], exported, (x,))
    assert count(program, "aten.reshape") == 2


@given(data=st.data(), rank=st.integers(2, 5))
def test_a_permutation_and_its_inverse_cancel_and_no_other(data, rank) -> None:
    order = data.draw(st.permutations(range(rank)))
    other = data.draw(st.permutations(range(rank)))
    x = torch.randn(*range(2, 2 + rank))
    program, _ = canonical(lambda a: a.permute(order).permute(other).exp(), x)
    together = [order[axis] for axis in other]
    gone = sum(each == list(range(rank)) for each in (together,))
    assert (count(program, "aten.permute") == 0) is bool(gone)


def test_the_permutation_of_each_spelling() -> None:
    exported = export(lambda a: (a.permute(2, 0, 1), a.transpose(-1, 0), a[0].t()), (X,))
    orders = [
        permutation(find(exported, name)[0])
        for name in ("aten.permute", "aten.transpose", "aten.t")
    ]
    assert orders == [[2, 0, 1], [2, 1, 0], [1, 0]]
