"""Operators that move or make values, as the runtime resizes and bounds them."""

from typing import Any

import pytest
import torch

from edgepass.ops.errors import SimulatorError
from edgepass.simulator.graph import Symbol
from tests.simulator.graphs import activation, one_call

X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("aten.view_copy.default", [[2, -1]], X.view(2, 6)),
        ("aten.permute_copy.default", [[1, 0]], X.t()),
        ("aten.unsqueeze_copy.default", [-1], X[..., None]),
        ("aten.squeeze_copy.dims", [[0]], X),
        ("aten.select_copy.int", [1, -1], X[:, -1]),
        ("aten.slice_copy.Tensor", [1, 1, 9223372036854775807, 2], X[:, 1::2]),
        ("aten.slice_copy.Tensor", [0, -2, None, 1], X[-2:]),
        ("aten.flip.default", [[0]], X.flip(0)),
        ("aten.expand_copy.default", [[2, 3, 4], False], X.expand(2, 3, 4)),
        ("aten.repeat.default", [[1, 2]], X.repeat(1, 2)),
        ("aten.repeat_interleave.self_int", [2, 0, None], X.repeat_interleave(2, 0)),
        (
            "aten.constant_pad_nd.default",
            [[0, 2], 7.0],
            torch.nn.functional.pad(X, (0, 2), value=7),
        ),
        ("aten.full_like.default", [2.0, None, None, None, None, None], torch.full((3, 4), 2.0)),
    ],
)
def test_gives_what_torch_gives(name: str, arguments: list[Any], expected: torch.Tensor) -> None:
    delegate = one_call(name, [activation(3, 4), *arguments], activation(*expected.shape))
    assert torch.equal(delegate.run([X])[0], expected)


def test_arange_and_full_make_what_they_are_asked() -> None:
    made = one_call("aten.arange.start_step", [2, 8, 3, *[None] * 4], activation(2))
    assert made.run([])[0].tolist() == [2.0, 5.0]
    ids = one_call(
        "aten.full.default", [[2, 2], 3, *[None] * 4], activation(2, 2, dtype=torch.int32)
    )
    assert ids.run([])[0].tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("name", "arguments", "inputs"),
    [
        ("aten.full.default", [[1 << 20, 1 << 20], 0.0], []),
        ("aten.arange.start_step", [0, 1 << 40, 1], []),
        ("aten.repeat.default", [activation(3, 4), [1 << 20, 1 << 20]], [X]),
        ("aten.constant_pad_nd.default", [activation(3, 4), [0, 1 << 40]], [X]),
        ("aten.expand_copy.default", [activation(3, 4), [1 << 30, 3, 4]], [X]),
    ],
)
def test_nothing_is_made_larger_than_the_program_says(
    name: str, arguments: list[Any], inputs: list[torch.Tensor]
) -> None:
    delegate = one_call(name, arguments, activation(16))
    with pytest.raises(SimulatorError, match="accepted are at most the 16 values"):
        delegate.run(inputs)


def test_splits_keep_their_largest_sizes() -> None:
    delegate = one_call(
        "aten.split_with_sizes_copy.default",
        [activation(5, 4), [1, 3], 1],
        activation(5, 1),
        activation(5, 3),
    )
    left, right = delegate.run([X])
    assert torch.equal(left, torch.cat((X[:, :1], torch.zeros(2, 1))))
    assert torch.equal(right, torch.cat((X[:, 1:], torch.zeros(2, 3))))
    whole = torch.randn(5, 4)
    assert torch.equal(torch.cat(delegate.run([whole]), 1), whole)


def test_symbols_are_computed() -> None:
    size = one_call("sym_size.int", [activation(8, 4), 0], Symbol(0))
    assert size.run([X]) == [3]
    picked = one_call(
        "et_vk.select_as_symint.default", [activation(4, dtype=torch.int32), 0, -1], Symbol(0)
    )
    assert picked.run([torch.tensor([1, 2, 3, 9])]) == [9]
    assert one_call("floordiv", [-7, 2], Symbol(0)).run([]) == [-4]
