"""Data movement in the forms that the runtime resizes right."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgepass.lowering.vulkan_rewrite import Rewritten, rewrite_for_vulkan
from edgepass.passes.targets import is_call
from tests.lowering.vulkan_programs import EagerRun, export_tokens


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rewrite(function: Callable[[Tensor], Tensor]) -> Rewritten:
    program = export_tokens(Function(function), 12)
    rewritten = rewrite_for_vulkan(program, merge=True, half=False)
    x = torch.randn(1, 9, 12)
    assert torch.equal(EagerRun(rewritten)(x), EagerRun(program)(x))
    return rewritten


def names(rewritten: Rewritten) -> list[str]:
    calls = [node for node in rewritten.program.graph.nodes if node.op == "call_function"]
    return [str(node.target) for node in calls]


def test_a_view_of_the_bits_is_no_reshape() -> None:
    rewritten = rewrite(lambda x: (x.view(torch.int32) & 0x7FFFFFFF).view(torch.float32))
    assert names(rewritten).count("aten.view.dtype") == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(1, x.shape[1], 3, -1),
        lambda x: x.reshape(x.shape[1], 12),
        lambda x: x.flatten(1),
        lambda x: x.unflatten(2, (2, 6)),
    ],
)
def test_the_dynamic_size_of_a_view_is_inferred(function: Callable[[Tensor], Tensor]) -> None:
    rewritten = rewrite(function)
    (view,) = [n for n in rewritten.program.graph.nodes if is_call(n, "aten.view", "aten.reshape")]
    assert list(view.args[1]).count(-1) == 1
    assert all(isinstance(size, int) for size in view.args[1])
    assert rewritten.whole


def test_two_dynamic_sizes_are_left_alone() -> None:
    rewritten = rewrite(lambda x: (x[:, :, :1] @ x[:, :, 1:2].transpose(1, 2)).flatten(0, 1))
    assert not rewritten.whole


def test_the_last_token_is_selected() -> None:
    rewritten = rewrite(lambda x: x[:, -1:, :])
    assert names(rewritten) == ["aten.select.int", "aten.unsqueeze.default"]
    assert rewritten.whole


def test_the_last_of_a_known_size_is_sliced() -> None:
    assert names(rewrite(lambda x: x[:, :, -1:])) == ["aten.slice.Tensor"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.mul(*x.chunk(2, dim=-1)),
        lambda x: torch.mul(*x.split(6, dim=2)),
        lambda x: torch.mul(*x.split([8, 4], dim=2)[1:] * 2),
    ],
)
def test_splits_of_channels_are_slices(function: Callable[[Tensor], Tensor]) -> None:
    rewritten = rewrite(function)
    assert not any("split" in name or "chunk" in name for name in names(rewritten))
    assert "aten.slice.Tensor" in names(rewritten)


@pytest.mark.parametrize("function", [lambda x: x * 2.5, lambda x: x / 3 - 1, lambda x: x + 1])
def test_numbers_become_constants(function: Callable[[Tensor], Tensor]) -> None:
    rewritten = rewrite(function)
    constants = list(rewritten.program.state_dict.values())
    assert all(constant.shape == (1, 1, 1) for constant in constants)
    assert rewritten.whole


def test_a_number_that_changes_the_dtype_is_left_alone() -> None:
    rewritten = rewrite(lambda x: x.round().to(torch.int32) * 2.5)
    assert rewritten.program.state_dict == {}
