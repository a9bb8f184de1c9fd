"""Calls that return their input are dropped; each near miss says why it stays."""

import pytest
import torch

from edgepass.passes.canonicalize import Canonicalize
from tests.passes.programs import count, export, reasons, run_passes

X = torch.randn(2, 3)


def canonical(function, *inputs, **buffers):
    return run_passes([Canonicalize()], export(function, inputs, **buffers), inputs)


@pytest.mark.parametrize(
    ("rule", "operator", "function"),
    [
        ("drop-cast", "aten.to", lambda a: a.to(torch.float32).exp()),
        ("drop-copy", "aten.clone", lambda a: a.clone().exp()),
        ("drop-copy", "aten.detach", lambda a: a.detach().exp()),
        ("drop-unit-factor", "aten.mul", lambda a: (1.0 * a).exp()),
        ("drop-unit-factor", "aten.div", lambda a: (a / 1).exp()),
    ],
)
def test_each_fires_once(rule, operator, function) -> None:
    program, log = canonical(function, X)
    assert log.counts[rule].applied == 1
    assert (count(program, operator), count(program, "aten.exp")) == (0, 1)


def test_a_cast_to_another_dtype_stays() -> None:
    _, log = canonical(lambda a: a.to(torch.float16) * 2, X)
    assert reasons(log, "drop-cast") == ["to turns float32[2, 3] into float16[2, 3]"]


def test_a_factor_that_changes_the_dtype_stays() -> None:
    program, log = canonical(lambda a: a * 1.0, torch.ones(3, dtype=torch.int64))
    assert count(program, "aten.mul") == 1
    assert reasons(log, "drop-unit-factor") == ["mul turns int64[3] into float32[3]"]


def test_a_factor_that_is_not_one_stays() -> None:
    program, _ = canonical(lambda a: a * 1.5, X)
    assert count(program, "aten.mul") == 1


def test_dropout_in_training_stays() -> None:
    exported = export(lambda a: torch.nn.functional.dropout(a, 0.5, training=True), (X,))
    from edgepass.passes.pipeline import Pipeline

    result = Pipeline([Canonicalize()]).run(exported)
    assert count(result.program, "aten.dropout") == 1


def test_a_copy_of_a_changed_buffer_stays() -> None:
    def forward(a, cache):
        before = cache.clone()
        cache.add_(a)
        return before + cache

    program, log = canonical(forward, X, cache=torch.ones(2, 3))
    assert count(program, "aten.clone") == 1
    assert reasons(log, "drop-copy") == ["b_cache or its copy is changed in place"]


def test_a_copy_that_is_changed_stays() -> None:
    def forward(a):
        copied = (a * 1.0).exp().clone()
        return copied.add_(1) + a

    program, _ = canonical(forward, X)
    assert count(program, "aten.clone") == 1


def test_contiguous_stays_where_strides_are_read() -> None:
    program, log = canonical(lambda a: a.t().contiguous().view(6), X)
    assert count(program, "aten.contiguous", "aten.clone") == 1
    assert reasons(log, "drop-copy")[0].endswith("changes the strides, which view reads")


def test_contiguous_goes_where_they_are_not() -> None:
    program, _ = canonical(lambda a: a.t().contiguous() + 1, X)
    assert count(program, "aten.contiguous", "aten.clone") == 0
