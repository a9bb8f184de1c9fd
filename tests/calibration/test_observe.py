"""Calibration refuses what would give a bad encoding, and names the module."""

import pytest
import torch
from torch import nn

from edgepass.calibration.observe import check_observers, observe
from edgepass.ops.errors import EncodingError
from tests.passes.kv_models import WIDTH, Chunk, prepare


def prepared(module: nn.Module | None = None):
    torch.manual_seed(0)
    return prepare(module or Chunk(), (torch.randn(1, 4, WIDTH),))


def batches(*scales: float):
    return [(torch.randn(1, 4, WIDTH) * scale,) for scale in scales]


def test_each_batch_runs_once() -> None:
    assert observe(prepared(), batches(1.0, 2.0, 3.0)) == 3


def test_no_batches_are_refused() -> None:
    with pytest.raises(EncodingError, match="no calibration data: got 0 batches"):
        observe(prepared(), [])


def test_an_observer_that_saw_nothing_is_named() -> None:
    with pytest.raises(EncodingError, match="no data: got an observer of"):
        check_observers(prepared())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad) -> None:
    module = Chunk()
    with torch.no_grad():
        module.second.v.weight[3, 5] = bad
    with pytest.raises(EncodingError, match=r"not finite: got .* in second\.v\.weight during"):
        observe(prepared(module), batches(1.0))


def test_the_module_that_computes_something_not_finite_is_named() -> None:
    module = Chunk()
    with torch.no_grad():
        module.second.v.weight.fill_(3e38)
    with pytest.raises(EncodingError, match=r"not finite: got .* in second\.v \(linear_\d+\)"):
        observe(prepared(module), batches(1.0))
