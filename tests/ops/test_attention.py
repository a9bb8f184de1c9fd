"""Attention over a static cache against softmax in float64, at every position and window."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import reference
from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import FLOATS, ROUNDING, make_tokens, seeds, sqnr_db

attend = torch.ops.edgepass.cached_attention


def make_operands(
    batch: int, kv_heads: int, repeats: int, tokens: int, rows: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    q = make_tokens((batch, tokens, kv_heads * repeats, width), torch.float32, seed)
    cache = (batch, kv_heads, rows, width)
    return q.transpose(1, 2), make_tokens(cache, torch.float32, seed + 1), torch.randn(cache)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, int]:
    """Operands, the position and the window (0: none)."""
    rows = draw(st.integers(1, 40))
    tokens = draw(st.integers(1, rows))
    operands = make_operands(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        tokens,
        rows,
        2 * draw(st.integers(1, 12)),
        draw(seeds),
    )
    position = torch.tensor([draw(st.integers(0, rows - tokens))])
    return operands, position, draw(st.integers(0, rows + 1))


@given(case=cases(), scale=st.floats(0.05, 1.0), softcap=st.sampled_from([0.0, 0.5, 50.0]))
def test_the_visible_rows_are_attended(
    case: tuple[tuple[Tensor, Tensor, Tensor], Tensor, int], scale: float, softcap: float
) -> None:
    operands, position, window = case
    exact = reference.cached_attention(*operands, position, scale, window, softcap)
    assert sqnr_db(exact, attend(*operands, position, scale, window, softcap)) >= 120


@given(case=cases(), softcap=st.sampled_from([0.0, 2.0]))
def test_rows_out_of_sight_may_hold_anything(
    case: tuple[tuple[Tensor, Tensor, Tensor], Tensor, int], softcap: float
) -> None:
    (q, keys, values), position, window = case
    wanted = attend(q, keys, values, position, 0.3, window, softcap)
    start, end = int(position), int(position) + q.shape[2]
    first = max(0, start - window + 1) if window else 0
    for cache in (keys, values):
        cache[:, :, :first] = torch.nan
        cache[:, :, end:] = torch.nan
    assert torch.equal(attend(q, keys, values, position, 0.3, window, softcap), wanted)


@given(rows=st.integers(2, 40), seed=seeds, window=st.sampled_from([0, 3]))
def test_tokens_one_by_one_are_the_tokens_together(rows: int, seed: int, window: int) -> None:
    q, keys, values = make_operands(1, 2, 3, rows, rows, 8, seed)
    together = attend(q, keys, values, torch.tensor([0]), 0.3, window)
    single = [
        attend(q[:, :, i : i + 1], keys, values, torch.tensor([i]), 0.3, window)
        for i in range(rows)
    ]
    assert sqnr_db(together, torch.cat(single, dim=2)) >= 120


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_dtypes(dtype: torch.dtype, tokens: int, softcap: float) -> None:
    operands = tuple(part.to(dtype) for part in make_operands(1, 2, 3, tokens, 20, 16, 0))
    position = torch.tensor([4])
    out = attend(*operands, position, 0.25, 0, softcap)
    exact = reference.cached_attention(*operands, position, 0.25, 0, softcap)
    assert out.dtype == dtype
    assert ((out - exact).abs() <= 8 * ROUNDING[dtype] * exact.abs().max()).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_opcheck(tokens: int, window: int, softcap: float) -> None:
    operands = make_operands(2, 2, 3, tokens, 12, 8, 0)
    torch.library.opcheck(attend.default, (*operands, torch.tensor([4]), 0.3, window, softcap))


class Attention(torch.nn.Module):
    """Attention as a decoder holds it: caches in buffers, tokens and position from outside."""

    def __init__(self) -> None:
        super().__init__()
        _, keys, values = make_operands(1, 2, 3, 1, 32, 8, 0)
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)

    def forward(self, q: Tensor, position: Tensor) -> Tensor:
        return attend(q, self.keys, self.values, position, 0.3)


def test_export_with_dynamic_tokens() -> None:
    module, position = Attention(), torch.tensor([2])
    tokens = torch.export.Dim("tokens", min=1, max=20)
    sample = make_tokens((1, 6, 7, 8), torch.float32, 0)
    exported = torch.export.export(
        module, (sample, position), dynamic_shapes=({2: tokens}, {})
    ).module()
    for count in (1, 7, 20):
        q = make_tokens((1, 6, count, 8), torch.float32, count)
        assert torch.equal(exported(q, position), module(q, position))


@pytest.mark.parametrize(("position", "tokens"), [(-1, 1), (-1, 3), (12, 1), (10, 3)])
def test_a_position_outside_the_cache_is_refused(position: int, tokens: int) -> None:
    operands = make_operands(1, 2, 3, tokens, 12, 8, 0)
    accepted = f"0..{12 - tokens} for {tokens} tokens, 12 rows"
    with pytest.raises(
        InvalidArgumentError, match=rf"got input_pos={position}; expected {accepted}"
    ):
        attend(*operands, torch.tensor([position]), 0.3)


BAD_OPERANDS = [
    ({"q": torch.zeros(6, 3, 8)}, r"got q.shape=\[6, 3, 8\]"),
    ({"q": torch.zeros(1, 5, 3, 8)}, r"got k_cache.shape=.*Hkv dividing H"),
    ({"q": torch.zeros(1, 6, 3, 8, dtype=torch.int32)}, r"got q.dtype=int32"),
    ({"k_cache": torch.zeros(1, 2, 12, 9)}, r"got k_cache.shape=\[1, 2, 12, 9\]"),
    ({"v_cache": torch.zeros(1, 2, 11, 8)}, r"got v_cache.shape=\[1, 2, 11, 8\]"),
    ({"v_cache": torch.zeros(1, 2, 12, 8).half()}, r"got v_cache.dtype=float16"),
    ({"input_pos": torch.zeros(2, dtype=torch.int64)}, r"got input_pos.shape=\[2\]"),
    ({"input_pos": torch.zeros(1)}, r"got input_pos.dtype=float32; expected int64"),
    ({"window": -1}, r"got window=-1; expected 0 \(none\) or more"),
    ({"softcap": -1.0}, r"got softcap=-1\.0; expected 0 \(none\) or a positive number"),
    ({"softcap": float("nan")}, r"got softcap=nan"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changes", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(changes: dict[str, Any], message: str, device: str) -> None:
    q, keys, values = make_operands(1, 2, 3, 3, 12, 8, 0)
    operands = {"q": q, "k_cache": keys, "v_cache": values, "input_pos": torch.tensor([4])}
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in ({**operands, "scale": 0.3} | changes).items()
    }
    with pytest.raises(InvalidArgumentError, match=f"cached_attention: {message}"):
        attend(**moved)
