"""Rotary embedding against complex multiplication, and the rows of its tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from edgepass.ops import reference
from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import FLOATS, ROUNDING, make_tokens, seeds

rotary = torch.ops.edgepass.rotary
position_rows = torch.ops.edgepass.position_rows


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5)),
    width=st.integers(1, 8).map(lambda half: 2 * half),
    passed=st.integers(0, 5),
    table=st.sampled_from(["rows", "batch", "heads"]),
    interleaved=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=seeds,
)
def test_pairs_are_turned_and_the_rest_passes(
    sizes: tuple[int, int, int],
    width: int,
    passed: int,
    table: str,
    interleaved: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    batch, heads, tokens = sizes
    x = make_tokens((batch, heads, tokens, width + passed), dtype, seed)
    shape = {"rows": (), "batch": (batch,), "heads": (batch, 1)}[table] + (tokens, width)
    cos, sin = (make_tokens(shape, torch.float32, seed + i) for i in (1, 2))
    out = rotary(x, cos, sin, interleaved)
    exact = reference.rotary(x, cos, sin, interleaved)
    assert out.dtype == dtype
    assert torch.equal(out[..., width:], x[..., width:])
    slack = 2.0**-20 * (x.double().abs().amax() if x.numel() else 0)
    assert ((out - exact).abs() <= ROUNDING[dtype] * exact.abs() + slack * 4).all()


@given(tokens=st.integers(1, 6), seed=seeds)
def test_halves_are_those_of_hugging_face(tokens: int, seed: int) -> None:
    q = make_tokens((2, 3, tokens, 16), torch.float32, seed)
    angles = make_tokens((1, tokens, 8), torch.float32, seed + 1).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    assert torch.equal(rotary(q, cos, sin, False), expected)
    assert torch.equal(rotary(q, cos[0], sin[0], False), expected)


def test_one_known_pair() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)  # a quarter turn: (a, b) becomes (-b, a)
    assert rotary(x, cos, sin, False).flatten().tolist() == [-3, -4, 1, 2]
    assert rotary(x, cos, sin, True).flatten().tolist() == [-2, 1, -4, 3]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(interleaved: bool, dtype: torch.dtype) -> None:
    x = make_tokens((2, 5, 3, 10), dtype, 0).transpose(1, 2)
    for shape in ((5, 6), (2, 5, 6), (2, 1, 5, 6), (5, 10)):
        cos, sin = torch.rand(shape), torch.rand(shape)
        torch.library.opcheck(rotary.default, (x, cos, sin, interleaved))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((3, 5, 8), (5, 8), (5, 8), r"got x.shape=\[3, 5, 8\]; expected \[B, H, S, D\]"),
        ((1, 3, 5, 8), (5, 7), (5, 7), r"got cos.shape=\[5, 7\]; .* R even, 2 <= R <= D"),
        ((1, 3, 5, 8), (5, 10), (5, 10), r"got cos.shape=\[5, 10\]"),
        ((1, 3, 5, 8), (8,), (8,), r"got cos.shape=\[8\]"),
        ((1, 3, 5, 8), (5, 8), (5, 6), r"got sin.shape=\[5, 6\]; expected \[5, 8\]"),
        ((1, 3, 5, 8), (4, 8), (4, 8), r"got cos.shape=\[4, 8\]; expected sizes that fit x"),
        ((2, 3, 5, 8), (3, 5, 8), (3, 5, 8), r"got cos.shape=\[3, 5, 8\]; expected sizes"),
    ],
)
def test_bad_shapes_are_refused(
    x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], message: str, device: str
) -> None:
    operands = (torch.zeros(shape, device=device) for shape in (x, cos, sin))
    with pytest.raises(InvalidArgumentError, match=f"rotary: {message}"):
        rotary(*operands, False)


@given(start=st.integers(0, 9), length=st.integers(0, 9), dtype=st.sampled_from(FLOATS))
def test_rows_of_a_position(start: int, length: int, dtype: torch.dtype) -> None:
    table = make_tokens((18, 4), dtype, 0)
    position = torch.tensor([start])
    rows = position_rows(table, position, length)
    assert rows.dtype == dtype
    assert torch.equal(rows.double(), reference.position_rows(table, position, length))
    rows.fill_(7)
    assert not (table == 7).any()


def test_opcheck_of_position_rows() -> None:
    table = torch.rand(9, 4)
    torch.library.opcheck(position_rows.default, (table, torch.tensor([3]), 4))
    torch.library.opcheck(position_rows.default, (table.t(), torch.tensor([0]), 4))


class Rows(torch.nn.Module):
    """The tables of a decoder: as many rows as there are tokens."""

    def forward(self, ids: Tensor, table: Tensor, position: Tensor) -> Tensor:
        return position_rows(table, position, ids.shape[1])


def test_export_with_dynamic_tokens() -> None:
    table, position = torch.rand(32, 4), torch.tensor([3])
    tokens = torch.export.Dim("tokens", min=1, max=20)
    exported = torch.export.export(
        Rows(), (torch.zeros(1, 7), table, position), dynamic_shapes=({1: tokens}, {}, {})
    ).module()
    for count in (1, 20):
        assert torch.equal(exported(torch.zeros(1, count), table, position), table[3 : 3 + count])


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (9, 1), (5, 5)])
def test_rows_outside_the_table_are_refused(start: int, length: int) -> None:
    accepted = rf"0\.\.{9 - length} for {length} rows of 9"
    with pytest.raises(InvalidArgumentError, match=f"got input_pos={start}; expected {accepted}"):
        position_rows(torch.rand(9, 4), torch.tensor([start]), length)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("table", "position", "length", "message"),
    [
        (torch.rand(9), torch.tensor([0]), 1, r"got table.shape=\[9\]; expected \[C, R\]"),
        (torch.rand(9, 4), torch.tensor([0.0]), 1, r"got input_pos.dtype=float32"),
        (torch.rand(9, 4), torch.tensor([0, 1]), 1, r"got input_pos.shape=\[2\]; expected \[1\]"),
        (torch.rand(9, 4), torch.tensor([0]), -1, r"got length=-1; expected 0 or more"),
    ],
)
def test_bad_rows_are_refused(
    table: Tensor, position: Tensor, length: int, message: str, device: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=f"position_rows: {message}"):
        position_rows(table.to(device), position.to(device), length)
