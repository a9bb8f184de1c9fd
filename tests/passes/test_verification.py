"""Verification: values compared one by one, caches copied for each run, flips told apart."""

import math
from dataclasses import dataclass

import pytest
import torch

from edgepass.ops.errors import InvalidArgumentError, VerificationError
from edgepass.passes.graph_pass import GraphPass
from edgepass.passes.pattern import ops
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rule import RewriteRule
from edgepass.passes.verification import required_db, run_program, signal_to_noise_db
from tests.passes.programs import export

aten = ops("aten")
X = torch.randn(4, 8)


class Nudge(RewriteRule):
    """Replaces ``exp(x)`` by a value that differs a little, or in one row, as told."""

    name = "nudge"

    def __init__(self, noise: torch.Tensor) -> None:
        self.noise = noise

    def pattern(self, x):
        return aten.exp(x)

    def rewrite(self, match, editor):
        noise = editor.constant("noise", self.noise)
        sine = editor.call(torch.ops.aten.expm1, match.x)
        one = editor.call(torch.ops.aten.add.Tensor, sine, 1.0)
        return editor.call(torch.ops.aten.mul.Tensor, one, noise)


@dataclass(frozen=True)
class Approximate(GraphPass):
    noise: torch.Tensor
    name = "approximate"
    agreement_db = 100.0

    def rules(self):
        return (Nudge(self.noise),)


@dataclass(frozen=True)
class ApproximateWithFlips(Approximate):
    rounding_flip_db = 30.0


def verify(graph_pass, function, *inputs, **buffers) -> None:
    program = WorkingProgram(export(function, inputs, **buffers))
    Pipeline([graph_pass]).apply(program, verify=True, sample_inputs=inputs)


def noise(rows: int, size: float) -> torch.Tensor:
    factor = torch.ones(4, 1)
    factor[:rows] += size
    return factor


def test_a_difference_within_the_promise_passes() -> None:
    verify(Approximate(noise(4, 1e-6)), lambda a: a.exp().sin(), X)


def test_a_difference_beyond_it_names_the_value() -> None:
    with pytest.raises(VerificationError, match=r"changed exp \(rule nudge\): 60.0 dB, expected"):
        verify(Approximate(noise(4, 1e-3)), lambda a: a.exp().sin(), X)


def test_a_small_difference_cannot_grow_further_down() -> None:
    # Rounding to 8 steps turns the last bit into a step; the value itself is compared before.
    verify(Approximate(noise(4, 1e-6)), lambda a: (a.exp() * 1e6).round(), X)


def test_one_row_may_round_the_other_way_if_the_pass_says_so() -> None:
    verify(ApproximateWithFlips(noise(1, 1e-2)), lambda a: a.exp(), X)
    with pytest.raises(VerificationError):
        verify(Approximate(noise(1, 1e-2)), lambda a: a.exp(), X)
    with pytest.raises(VerificationError):
        verify(ApproximateWithFlips(noise(3, 1e-2)), lambda a: a.exp(), X)
    with pytest.raises(VerificationError):
        verify(ApproximateWithFlips(noise(1, 1e-1)), lambda a: a.exp(), X)


class SkipWrite(RewriteRule):
    name = "skip-write"

    def pattern(self, cache, x):
        return aten.add_(cache, x)

    def rewrite(self, match, editor):
        result = editor.call(torch.ops.aten.add.Tensor, match.cache, match.x)
        match.anchor.replace_all_uses_with(result)
        editor.remove(match.anchor)
        return {}


@dataclass(frozen=True)
class DropWrites(GraphPass):
    name = "drop-writes"

    def rules(self):
        return (SkipWrite(),)


def test_a_lost_write_to_a_cache_is_found() -> None:
    def forward(a, cache):
        return cache.add_(a).sin()

    with pytest.raises(VerificationError, match="pass=drop-writes changed output 1"):
        verify(DropWrites(), forward, X, cache=torch.zeros(4, 8))


def test_runs_leave_the_caches_alone() -> None:
    def forward(a, cache):
        return cache.add_(a) * 1

    exported = export(forward, (X,), cache=torch.zeros(4, 8))
    program = WorkingProgram(exported)
    first, second = (run_program(program, (X,))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not exported.state_dict["cache"].any()


def test_the_number_of_inputs_is_checked() -> None:
    program = WorkingProgram(export(lambda a: a.exp(), (X,)))
    with pytest.raises(InvalidArgumentError, match=r"sample_inputs with 2 values: .* takes 1"):
        Pipeline([DropWrites()]).apply(program, verify=True, sample_inputs=(X, X))


def test_agreement_of_special_values() -> None:
    special = torch.tensor([1.0, math.nan, math.inf])
    assert signal_to_noise_db(special, special.clone()) == math.inf
    assert signal_to_noise_db(special, special[:2]) == -math.inf
    assert signal_to_noise_db(special, torch.tensor([1.0, 2.0, math.inf])) == -math.inf
    assert signal_to_noise_db(special, torch.tensor([1.0, math.nan, -math.inf])) == -math.inf
    assert signal_to_noise_db(torch.zeros(2), torch.ones(2)) == -math.inf
    ten = signal_to_noise_db(torch.tensor([10.0]), torch.tensor([11.0]))
    assert ten == pytest.approx(20.0, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 100.0), (torch.float16, 60.0), (torch.bfloat16, 42.0)]
)
def test_a_16_bit_value_is_asked_less(dtype, least) -> None:
    assert required_db(Approximate(noise(0, 0)), torch.zeros(1, dtype=dtype)) == least
    assert required_db(DropWrites(), torch.zeros(1, dtype=dtype)) == math.inf
