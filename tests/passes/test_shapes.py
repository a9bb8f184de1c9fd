"""What is known of shapes, without a guard on a symbol."""

import torch
from torch.export import Dim

from edgepass.passes.shapes import (
    fake_tensor,
    is_same_kind,
    same_layout,
    same_size,
    same_sizes,
)
from tests.passes.programs import export, find


def test_symbolic_sizes_are_equal_by_expression() -> None:
    tokens = Dim("tokens", min=4, max=64)
    exported = export(
        lambda a: (a + 1, a[1:], a.transpose(0, 1)), (torch.ones(5, 5),), ({0: tokens},)
    )
    x = fake_tensor(next(n for n in exported.graph.nodes if n.op == "placeholder"))
    same, shorter = (fake_tensor(find(exported, n)[0]) for n in ("aten.add", "aten.slice"))
    turned = fake_tensor(find(exported, "aten.transpose")[0])
    assert same_sizes(x.shape, same.shape)
    assert not same_sizes(x.shape, shorter.shape)
    assert not same_size(x.shape[0], 5)
    assert same_sizes(x.shape, turned.shape[::-1])
    assert len(exported.range_constraints) == 1


def test_strides_of_dimensions_of_one_are_free() -> None:
    row = torch.ones(1, 4)
    assert same_layout(row, torch.ones(4, 1).t())
    assert not same_layout(torch.ones(4, 4), torch.ones(4, 4).t())


def test_kind_is_dtype_device_and_shape() -> None:
    x = torch.ones(2, 3)
    assert is_same_kind(x, torch.zeros(2, 3))
    assert not is_same_kind(x, x.double())
    assert not is_same_kind(x, x.t())
    assert not is_same_kind(x, x[None])


def test_only_tensors_have_a_fake_tensor() -> None:
    assert fake_tensor(3) is None
    exported = export(lambda a: a.max(-1), (torch.ones(2, 3),))
    assert fake_tensor(find(exported, "aten.max")[0]) is None
