"""Int4 layouts: known bytes, exact inverses, ragged shapes, equality with the stock packers."""

import pytest
import torch
from executorch.backends.vulkan.patterns.weight_packing_utils import pack_4bit_weight_tensor
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 (registers)
from hypothesis import given
from hypothesis import strategies as st

from edgepass.ops import packing
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.reference import unpack_linear_layout
from tests.ops.cases import seeds


def random_int4(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)


ALL_PAIRS = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)


def test_linear_layout_holds_the_even_column_in_the_low_nibble() -> None:
    # XNNPACK's qbint4 filter: value + 8, so that -8 is nibble 0 and 7 is nibble 15.
    assert packing.pack_int4(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist() == [[0xF0]]
    assert packing.pack_int4(torch.tensor([[1, 2, 3]], dtype=torch.int8)).tolist() == [[0xA9, 0x8B]]


def test_embedding_layout_holds_the_even_column_in_the_high_nibble() -> None:
    packed = packing.pack_embedding_int4(torch.tensor([[-8, 7, 1, 2]], dtype=torch.int8))
    assert packed.tolist() == [[0x0F, 0x9A]]


def test_every_pair_of_values_has_its_byte() -> None:
    expected = [[(even + 8) + 16 * (odd + 8)] for even, odd in ALL_PAIRS.tolist()]
    assert packing.pack_int4(ALL_PAIRS).tolist() == expected
    assert torch.equal(packing.unpack_int4(packing.pack_int4(ALL_PAIRS), 2), ALL_PAIRS)


@given(n=st.integers(1, 20), k=st.integers(1, 40), seed=seeds)
def test_linear_layout_is_what_the_stock_vulkan_packer_writes(n: int, k: int, seed: int) -> None:
    w = random_int4(n, k, seed)
    stock = pack_4bit_weight_tensor(w, inner_dim_padding=2)
    assert torch.equal(packing.pack_int4(w), stock)


@given(n=st.integers(1, 20), half=st.integers(1, 20), seed=seeds)
def test_embedding_layout_is_what_the_stock_operator_reads(n: int, half: int, seed: int) -> None:
    w = random_int4(n, 2 * half, seed)
    scales = torch.ones(n, 1)
    read = torch.ops.quantized_decomposed.embedding_4bit.default(
        packing.pack_embedding_int4(w), scales, None, -8, 7, torch.arange(n)
    )
    assert torch.equal(read, w.float())


@given(n=st.integers(0, 20), k=st.integers(0, 40), seed=seeds)
def test_unpacking_inverts_packing(n: int, k: int, seed: int) -> None:
    w = random_int4(n, k, seed)
    packed = packing.pack_int4(w)
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(packing.unpack_int4(packed, k), w)
    assert torch.equal(packing.unpack_embedding_int4(packing.pack_embedding_int4(w), k), w)


@given(n=st.integers(1, 20), k=st.integers(1, 40), seed=seeds)
def test_unpacking_agrees_with_the_reference(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, dtype=torch.uint8)
    assert torch.equal(packing.unpack_int4(packed, k).long(), unpack_linear_layout(packed, k))


def test_chunks_meet_without_a_seam() -> None:
    w = random_int4(37, packing._PACKED_AT_ONCE // 16, 0)
    assert w.numel() // 2 > packing._PACKED_AT_ONCE > packing._CHUNK
    packed = packing.pack_int4(w)
    assert torch.equal(unpack_linear_layout(packed, w.shape[1]), w.long())
    assert torch.equal(packing.unpack_int4(packed, w.shape[1]), w)


def test_threads_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    w = random_int4(7, 11, 0)
    packed = packing.pack_int4(w)
    assert torch.equal(unpack_linear_layout(packed, w.shape[1]), w.long())
    assert torch.equal(packing.unpack_int4(packed, w.shape[1]), w)
    w[-1, -1] = 8
    with pytest.raises(InvalidArgumentError, match=r"w=-8\.\.8; expected values in -8\.\.7"):
        packing.pack_int4(w)


def test_non_contiguous_weights() -> None:
    w = random_int4(12, 30, 0)
    assert torch.equal(packing.pack_int4(w.t()), packing.pack_int4(w.t().contiguous()))
    packed = packing.pack_int4(random_int4(30, 24, 0)).t()
    assert torch.equal(
        packing.unpack_int4(packed, 60), packing.unpack_int4(packed.contiguous(), 60)
    )


def test_the_padding_of_an_odd_row_is_the_value_zero() -> None:
    packed = packing.pack_int4(random_int4(9, 5, 0))
    assert (packed[:, -1] >> 4 == 8).all()


def test_a_weight_at_an_odd_address() -> None:
    w = random_int4(6, 8, 0)
    odd = torch.zeros(49, dtype=torch.int8)[1:].view(6, 8).copy_(w)
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(packing.pack_int4(odd), packing.pack_int4(w))


@pytest.mark.parametrize("value", [*range(-128, -8), *range(8, 128)])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_value_outside_int4_is_refused(value: int, place: int) -> None:
    w = random_int4(4, 10, 0)
    w.view(-1)[place] = value
    with pytest.raises(InvalidArgumentError, match=rf"w=.*{value}.* expected values in -8..7"):
        packing.pack_int4(w)


@pytest.mark.parametrize("w", [torch.zeros(4, dtype=torch.int8), torch.zeros(2, 2)])
def test_another_rank_or_dtype_is_refused(w: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=r"pack_int4: got w\.(shape|dtype)="):
        packing.pack_int4(w)


def test_a_packed_tensor_of_another_width_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"packed\.shape=\[2, 3\]; .* with k=7"):
        packing.unpack_int4(torch.zeros(2, 3, dtype=torch.uint8), 7)


@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 9),
    zeros=st.sampled_from(["none", "zero", "any"]),
    seed=seeds,
)
def test_dequantizing_by_groups(
    n: int, groups: int, group_size: int, zeros: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = random_int4(n, groups * group_size, seed)
    scales = torch.rand(n, groups, generator=generator)
    zero = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
    zero = {"none": None, "zero": torch.zeros_like(zero), "any": zero}[zeros]
    offset = 0 if zero is None else zero.double().repeat_interleave(group_size, 1)
    expected = (w.double() - offset) * scales.double().repeat_interleave(group_size, 1)
    packed = packing.pack_int4(w)
    exact = packing.dequantize_int4(packed, scales, zero, group_size, torch.float64)
    assert torch.equal(exact, expected)
    assert torch.equal(packing.dequantize_int4(packed, scales, zero, group_size), expected.float())
    assert torch.equal(packing.dequantize_groups(w, scales, zero, group_size), expected.float())
