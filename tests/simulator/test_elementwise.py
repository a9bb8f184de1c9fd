"""Where the runtime's formulas are not torch's."""

import math

import pytest
import torch

from edgepass.simulator.registry import as_half
from tests.simulator.graphs import activation, one_call

X = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])


def unary(name: str, *arguments: object) -> torch.Tensor:
    return one_call(name, [activation(5), *arguments], activation(5)).run([X])[0]


def binary(name: str, y: torch.Tensor, *arguments: object) -> torch.Tensor:
    delegate = one_call(name, [activation(5), activation(5), *arguments], activation(5))
    return delegate.run([X, y])[0]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_the_tanh_form_whatever_is_asked(approximate: str) -> None:
    expected = [
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in X
    ]
    assert torch.allclose(unary("aten.gelu.default", approximate), torch.tensor(expected))


def test_powers_of_negative_numbers() -> None:
    assert unary("aten.pow.Tensor_Scalar", 2.0).tolist() == [4.0, 0.25, 0.0, 1.0, 9.0]
    assert unary("aten.pow.Tensor_Scalar", 3.0).tolist() == [-8.0, -0.125, 0.0, 1.0, 27.0]
    found = binary("aten.pow.Tensor_Tensor", torch.full((5,), 2.0))
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [0.0, 1.0, 9.0]


def test_alpha_clamp_and_nearly_equal() -> None:
    y = torch.ones(5)
    assert torch.equal(binary("aten.add.Tensor", y, 2.0), X + 2)
    assert torch.equal(binary("aten.sub.Tensor", y, 0.5), X - 0.5)
    assert unary("aten.clamp.default", -1.0, None).tolist() == [-1.0, -0.5, 0.0, 1.0, 3.0]
    delegate = one_call(
        "aten.eq.Tensor", [activation(5), activation(5)], activation(5, dtype=torch.bool)
    )
    assert delegate.run([X, X + 1e-6])[0].all()
    assert not delegate.run([X, X + 1e-4])[0].any()


def test_half_results_are_rounded_to_half() -> None:
    half = torch.float16
    delegate = one_call(
        "aten.mul.Tensor",
        [activation(2, dtype=half), activation(2, dtype=half)],
        activation(2, dtype=half),
    )
    x = torch.tensor([0.1, 300.0])
    found = delegate.run([x, x])[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, as_half(as_half(x) * as_half(x)))
    assert found[1] == math.inf
