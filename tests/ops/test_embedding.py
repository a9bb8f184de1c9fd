"""Quantized embedding tables against the dequantized table and the stock operator."""

from typing import Any

import pytest
import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 (registers)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import reference, swap_nibbles
from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import FLOATS, make_weight, seeds

embed = torch.ops.edgepass.embedding_qg


@given(
    vocabulary=st.integers(1, 20),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(FLOATS),
    zeros=st.booleans(),
    shape=st.lists(st.integers(0, 3), max_size=3),
    id_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=seeds,
)
def test_rows_are_dequantized_and_rounded_once(
    vocabulary: int,
    groups: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    zeros: bool,
    shape: list[int],
    id_dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = make_weight(vocabulary, groups, group_size, dtype=dtype, seed=seed)
    wide = torch.randint(-128, 128, table.values.shape, generator=generator, dtype=torch.int8)
    ids = torch.randint(0, vocabulary, shape, generator=generator, dtype=id_dtype)
    operands = (
        table.packed if bits == 4 else wide,
        table.scales,
        table.zeros if zeros else None,
        group_size,
        bits,
        ids,
    )
    out = embed(*operands)
    assert out.shape == (*shape, groups * group_size)
    assert torch.equal(out, reference.embedding_qg(*operands).to(dtype))


@given(half_groups=st.integers(1, 4), group_size=st.integers(2, 9), seed=seeds)
def test_the_stock_operator_gives_the_same(half_groups: int, group_size: int, seed: int) -> None:
    table = make_weight(11, 2 * half_groups, group_size, seed=seed)
    ids = torch.tensor([[3, 0, 10]])
    stock = torch.ops.quantized_decomposed.embedding_4bit.default(
        swap_nibbles(table.packed), table.scales, table.zeros.float(), -8, 7, ids
    )
    ours = embed(table.packed, table.scales, table.zeros, group_size, 4, ids)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_opcheck(bits: int, zeros: bool) -> None:
    table = make_weight(9, 3, 5)
    weight = table.packed if bits == 4 else table.values
    ids = torch.tensor([[8, 0], [2, 2]])
    torch.library.opcheck(
        embed.default, (weight, table.scales, table.zeros if zeros else None, 5, bits, ids)
    )


@pytest.mark.parametrize(("ids", "got"), [([-1, 3], "-1..3"), ([0, 9], "0..9")])
def test_ids_outside_the_table_are_refused(ids: list[int], got: str) -> None:
    table = make_weight(9, 3, 5)
    with pytest.raises(InvalidArgumentError, match=rf"got ids={got}; expected ids in 0\.\.8"):
        embed(table.packed, table.scales, None, 5, 4, torch.tensor(ids))


BAD_OPERANDS = [
    ({"bits": 3}, r"got bits=3; expected 4 or 8"),
    ({"bits": 8}, r"got weight.dtype=uint8; expected int8"),
    ({"group_size": 0}, r"got group_size=0; expected 1 or more"),
    ({"group_size": 4}, r"got weight.shape=\[9, 8\]; expected \[9, 6\]"),
    ({"scales": torch.ones(9)}, r"got scales.shape=\[9\]"),
    ({"scales": torch.ones(8, 3)}, r"got weight.shape=\[9, 8\]; expected \[8, 8\]"),
    ({"zeros": torch.zeros(9, 2, dtype=torch.int8)}, r"got zeros.shape=\[9, 2\]"),
    ({"zeros": torch.zeros(9, 3).int()}, r"got zeros.dtype=int32; expected int8 or float32"),
    ({"ids": torch.zeros(2)}, r"got ids.dtype=float32; expected int64 or int32"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changes", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(changes: dict[str, Any], message: str, device: str) -> None:
    table = make_weight(9, 3, 5)
    operands = {
        "weight": table.packed,
        "scales": table.scales,
        "zeros": table.zeros,
        "group_size": 5,
        "bits": 4,
        "ids": torch.tensor([1, 2]),
    }
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in (operands | changes).items()
    }
    with pytest.raises(InvalidArgumentError, match=f"embedding_qg: {message}"):
        embed(**moved)
