"""Rows of tables, in both packings, and ids outside them."""

import pytest
import torch

from edgepass.ops import pack_int4
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.packing import pack_embedding_int4
from edgepass.simulator.delegate import Delegate
from tests.simulator.graphs import activation, constant, one_call

VALUES = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4)
SCALES = torch.tensor([[1.0, 0.5], [2.0, 4.0], [-1.0, 0.25]])


def table(is_linear: bool) -> Delegate:
    packed = (pack_int4 if is_linear else pack_embedding_int4)(VALUES)
    ids = activation(2, 8, dtype=torch.int32)
    arguments = [constant(packed), constant(SCALES), 32, ids, is_linear]
    return one_call("et_vk.embedding_q4gsw.default", arguments, activation(2, 8, 64))


@pytest.mark.parametrize("is_linear", [True, False])
def test_rows_are_dequantized(is_linear: bool) -> None:
    ids = torch.tensor([[0, 2], [1, 1]], dtype=torch.int32)
    expected = VALUES.float() * SCALES.repeat_interleave(32, 1)
    assert torch.equal(table(is_linear).run([ids])[0], expected[ids.long()])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_ids_outside_a_table_are_refused(wrong: int) -> None:
    ids = torch.tensor([[0, wrong]], dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=f"id={wrong}, accepted are 0 to 2"):
        table(True).run([ids])
    weight = constant(torch.randn(3, 4))
    arguments = [weight, activation(1, 8, dtype=torch.int32), -1, False, False]
    floats = one_call("aten.embedding.default", arguments, activation(1, 8, 4))
    with pytest.raises(InvalidArgumentError, match=f"id={wrong}, accepted are 0 to 2"):
        floats.run([ids])


@pytest.mark.parametrize("name", ["aten.index_select.default", "aten.gather.default"])
def test_indices_are_checked(name: str) -> None:
    x, index = activation(4), activation(4, dtype=torch.int32)
    delegate = one_call(name, [x, 0, index], activation(4))
    given = torch.arange(4.0)
    found = delegate.run([given, torch.tensor([3, 0], dtype=torch.int32)])[0]
    assert found.tolist() == [3.0, 0.0]
    with pytest.raises(InvalidArgumentError, match="id=4, accepted are 0 to 3"):
        delegate.run([given, torch.tensor([4], dtype=torch.int32)])


def test_index_tensor_takes_rows() -> None:
    delegate = one_call(
        "aten.index.Tensor",
        [activation(4, 2), [activation(3, dtype=torch.int32)]],
        activation(3, 2),
    )
    # The index is inside of a list, and so the first input.
    found = delegate.run([torch.arange(8.0).view(4, 2), torch.tensor([2, 0], dtype=torch.int32)])
    assert found[0].tolist() == [[4.0, 5.0], [0.0, 1.0]]
