"""Int4 linears: values worked out by hand, and the shaders' loops written out lane by lane."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import pack_int4
from edgepass.ops.errors import SimulatorError
from edgepass.simulator.delegate import Delegate
from edgepass.simulator.quantize import choose_qparams
from tests.simulator.graphs import activation, constant, one_call

DYNAMIC, PLAIN = "et_vk.linear_dq8ca_q4gsw.default", "et_vk.linear_q4gsw.default"


def group_sums(values: Tensor, group: int) -> Tensor:
    return values.int().unflatten(1, (-1, group)).sum(2, dtype=torch.int32).t().contiguous()


def words(values: Tensor) -> Tensor:
    """Pack ``[N, K]``, rows padded to words of 8 columns."""
    return pack_int4(torch.nn.functional.pad(values, (0, -values.shape[1] % 8)))


def dynamic(
    values: Tensor, scales: Tensor, group: int, sums: Tensor | None = None, bias: Any = None
) -> Delegate:
    n, k = values.shape
    return one_call(
        DYNAMIC,
        [
            activation(64, k),
            activation(64),
            activation(64, dtype=torch.int8),
            constant(words(values)),
            constant(group_sums(values, group) if sums is None else sums),
            constant(scales),
            group,
            bias,
        ],
        activation(64, n),
    )


def run(delegate: Delegate, x: Tensor) -> Tensor:
    scale, zero = choose_qparams(x)
    return delegate.run([x, scale, zero.to(torch.int8)])[0]


def test_by_hand() -> None:
    values = torch.tensor([[1, 2, 3, -4], [0, 7, -8, 1]] * 4, dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0] * 4])
    delegate = dynamic(values, scales, 4)
    # Rows of 0 to 255 and of 255 to 0: a scale of 1, zero point -128, so that q - zero is x.
    x = torch.tensor([[0.0, 1.0, 2.0, 255.0], [255.0, 2.0, 1.0, 0.0]])
    expected = torch.tensor(
        [[0.5 * (2 + 6 - 1020), 2.0 * (7 - 16 + 255)], [0.5 * (255 + 4 + 3), 2.0 * (14 - 8)]]
    )
    assert torch.equal(run(delegate, x), expected.repeat(1, 4))


def test_one_token_is_not_quantized() -> None:
    values = torch.tensor([[1, 0, 0, 0]] * 8, dtype=torch.int8)
    delegate = dynamic(values, torch.ones(1, 8), 4)
    x = torch.tensor([[0.3, 0.0, 0.0, 100.0]])
    assert torch.equal(run(delegate, x)[0], torch.full((8,), 0.3))
    # In steps of 100 / 255, 0.3 is the first.
    assert run(delegate, x.repeat(2, 1))[1, 0].item() == pytest.approx(100 / 255)


def test_a_bias_is_added() -> None:
    values = torch.ones(8, 4, dtype=torch.int8)
    bias = torch.arange(8.0)
    delegate = dynamic(values, torch.ones(1, 8), 4, bias=constant(bias))
    assert torch.equal(run(delegate, torch.zeros(2, 4)), bias.repeat(2, 1))


def test_a_zero_point_is_taken_out_by_the_serialized_sums() -> None:
    values = torch.ones(8, 4, dtype=torch.int8)
    wrong = group_sums(values, 4) + 1
    delegate = dynamic(values, torch.ones(1, 8), 4, sums=wrong)
    x = torch.tensor([[0.0, 0.0, 0.0, 255.0]] * 2)
    # The zero point is -128, and each sum is one too large.
    assert torch.equal(run(delegate, x), torch.full((2, 8), 255.0 + 128.0))


def lanes_of(group: int) -> int:
    return 32 if group >= 128 else 16


def shader(x: Tensor, values: Tensor, scales: Tensor, sums: Tensor, group: int) -> Tensor:
    """The two shaders for several tokens as loops over integers, in float64.

    ``quantize_and_pack_4h4w_with_group_sums.glsl`` and ``linear_dq8ca_q4gsw_tiled.glsl``.
    """
    (n, k), tokens = values.shape, x.shape[0]
    scale, zero = choose_qparams(x)
    q = (torch.round(x * (1 / scale)[:, None]) + zero[:, None]).clamp(-128, 127).long()
    steps, wide = math.ceil(group / 4), math.ceil(n / 4) * 4
    flat_scales, flat_sums = scales.reshape(-1).tolist(), sums.reshape(-1).tolist()
    out = torch.zeros(tokens, n, dtype=torch.float64)
    for m in range(tokens):
        for g in range(k // 4 // steps):
            lanes = [0] * lanes_of(group)
            for step in range(steps):
                lane, at = step % len(lanes), 4 * (g * steps + step)
                lanes[lane] += lanes[lane] + int(q[m, at : at + 4].sum())
            columns = slice(4 * g * steps, 4 * (g + 1) * steps)
            for i in range(n):
                place = g * wide + i
                w_sum = flat_sums[place] if place < len(flat_sums) else 0
                w_scale = flat_scales[place] if place < len(flat_scales) else 0.0
                accumulated = int((q[m, columns] * (values[i, columns].long() + 8)).sum())
                adjusted = accumulated - w_sum * int(zero[m]) - 8 * sum(lanes)
                out[m, i] += adjusted * float(scale[m]) * w_scale
    return out


@given(st.data())
def test_several_tokens_are_what_the_shaders_loops_give(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([4, 20, 32, 50, 64, 96, 100, 128, 256]), "group")
    groups = data.draw(st.integers(1, 3), "groups")
    k = group * groups // 4 * 4
    n = 4 * data.draw(st.integers(1, 4), "n/4")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand(groups, n, generator=generator) + 0.1
    # Stock pads the rows of sums to 8 features.
    width = n + data.draw(st.sampled_from([0, -n % 8]), "padding")
    sums = torch.zeros(groups, width, dtype=torch.int32)
    whole = values[:, : k // group * group]
    sums[: k // group, :n] = group_sums(whole, group) if group <= k else 0
    x = torch.randn(3, k, generator=generator)
    found = run(dynamic(values, scales, group, sums), x).double()
    expected = shader(x, values, scales, sums, group)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@given(st.sampled_from([32, 50, 100, 256]), st.integers(1, 3), st.integers(0, 99))
def test_one_token_takes_scales_by_the_shaders_steps(group: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = group * groups // 4 * 4
    values = torch.randint(-8, 8, (8, k), dtype=torch.int8, generator=generator)
    scales = torch.rand(groups, 8, generator=generator) + 0.1
    x = torch.randn(1, k, generator=generator)
    sums = torch.zeros(groups, 8, dtype=torch.int32)
    # linear_q4gsw_coop.glsl: four columns at a time, new scales every ceil(group / 4) times.
    expected = torch.zeros(8, dtype=torch.float64)
    for column in range(k):
        g = column // 4 // math.ceil(group / 4)
        expected += x[0, column].double() * values[:, column] * scales[g].double()
    found = run(dynamic(values, scales, group, sums), x)[0].double()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)


def plain(values: Tensor, scales: Tensor, group: int, *shape: int, bias: Any = None) -> Delegate:
    arguments = [activation(*shape, values.shape[1]), constant(pack_int4(values))]
    result = activation(*shape, values.shape[0])
    return one_call(PLAIN, [*arguments, constant(scales), group, bias], result)


def test_weight_only_by_hand() -> None:
    values = torch.tensor([[1, 2, 3, -4], [0, 7, -8, 1], [1, 1, 1, 1], [-8, 0, 0, 7]])
    delegate = plain(values.to(torch.int8), torch.tensor([[0.5, 2.0, 1.0, 4.0]]), 4, 8)
    x = torch.tensor([[1.0, 0.5, -1.0, 2.0], [0.25, 0.0, 0.0, 1.0]])
    expected = torch.tensor([[-4.5, 27.0, 2.5, 24.0], [-1.875, 2.0, 1.25, 20.0]])
    assert torch.equal(delegate.run([x])[0], expected)
    assert torch.equal(delegate.run([x[:1]])[0], expected[:1])


def test_of_a_batch_only_the_first_matrix_is_written() -> None:
    values = torch.ones(4, 4, dtype=torch.int8)
    delegate = plain(values, torch.ones(1, 4), 4, 2, 8)
    found = delegate.run([torch.ones(2, 3, 4)])[0]
    assert torch.equal(found[0], torch.full((3, 4), 4.0))
    assert torch.equal(found[1], torch.zeros(3, 4))


def test_half_scales_in_a_float_program_are_misread() -> None:
    values = torch.randint(-8, 8, (8, 32), dtype=torch.int8)
    scales = (torch.rand(1, 8) + 0.5).half()
    delegate = dynamic(values, scales, 32)
    x = torch.randn(2, 32)
    as_floats = torch.zeros(1, 8)
    as_floats.view(-1)[:4] = scales.reshape(-1).view(torch.float32)
    assert torch.equal(run(delegate, x), run(dynamic(values, as_floats, 32), x))


def test_a_half_program_with_a_float_output_is_misread() -> None:
    """What stock made of fp16 models with bias: its reference adds the bias in float."""
    half, values = torch.float16, torch.ones(8, 32, dtype=torch.int8)
    arguments = [activation(4, 32, dtype=half), activation(4, dtype=half)]
    constants = [constant(words(values)), constant(group_sums(values, 32))]
    scales, bias = constant(torch.ones(1, 8, dtype=half)), constant(torch.ones(8, dtype=half))
    delegate = one_call(
        DYNAMIC,
        [*arguments, activation(4, dtype=torch.int8), *constants, scales, 32, bias],
        activation(4, 8),
    )
    x = torch.ones(2, 32)
    scale, zero = choose_qparams(x)
    # Two halves of 1 are one float of 0x3C003C00; the buffer ends after four of them.
    one = torch.tensor([0x3C003C00], dtype=torch.int32).view(torch.float32).item()
    expected = torch.tensor([32 * one + one] * 4 + [0.0] * 4).repeat(2, 1)
    found = delegate.run([x, scale, zero.to(torch.int8)])[0]
    assert torch.allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("k", "n", "group", "words_of"),
    [(6, 8, 2, "argument 6 is 2"), (10, 8, 5, "K=10 is not a multiple of 4")],
)
def test_what_the_runtime_does_not_load_is_named(k: int, n: int, group: int, words_of: str) -> None:
    values = torch.zeros(n, k, dtype=torch.int8)
    with pytest.raises(SimulatorError, match=f"linear_dq8ca_q4gsw.default: {words_of}"):
        dynamic(values, torch.ones(k // group, n), group)


def test_half_sums_round_at_each_product() -> None:
    """1 and 2048 halves of 1: the sum stays at 2048, where half's steps are 2."""
    k = 2080
    values = torch.ones(4, k, dtype=torch.int8)
    half = torch.float16
    delegate = one_call(
        PLAIN,
        [
            activation(8, k, dtype=half),
            constant(pack_int4(values)),
            constant(torch.ones(k // 32, 4).half()),
            *(32, None),
        ],
        activation(8, 4, dtype=half),
    )
    x = torch.ones(2, k)
    assert torch.equal(delegate.run([x])[0], torch.full((2, 4), 2048.0))
    # For one token the accumulator is float.
    assert torch.equal(delegate.run([x[:1]])[0], torch.full((1, 4), 2080.0))


def test_in_half_buffers_groups_are_added_in_half() -> None:
    half, k, n, group = torch.float16, 128, 8, 32
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.rand(k // group, n, generator=generator) * 0.1).half()
    delegate = one_call(
        DYNAMIC,
        [
            activation(8, k, dtype=half, is_buffer=True),
            activation(8, dtype=half),
            activation(8, dtype=torch.int8),
            constant(pack_int4(values)),
            constant(group_sums(values, group)),
            constant(scales),
            *(group, None),
        ],
        activation(8, n, dtype=half, is_buffer=True),
    )
    x = torch.randn(3, k, generator=generator).half().float()
    scale, zero = choose_qparams(x)
    scale = scale.half()
    steps = (x * (1 / scale.float())[:, None]).round() + zero[:, None]
    q = steps.clamp(-128, 127).long() - zero[:, None]
    expected = torch.zeros(3, n, dtype=half)
    for g in range(k // group):
        columns = slice(g * group, (g + 1) * group)
        total = (q[:, columns] @ values[:, columns].long().t()).to(half)
        factor = (scale.float()[:, None] * scales[g].float()).to(half)
        expected = (total.double() * factor.double() + expected.double()).to(half)
    found = delegate.run([x, scale.float(), zero.to(torch.int8)])[0]
    assert torch.equal(found, expected.float())
