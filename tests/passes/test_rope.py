"""Rotary embedding: every spelling becomes one operator, near misses say why."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgepass.ops  # noqa: F401
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rope import FuseRotary
from edgepass.passes.targets import is_call


class Halves(torch.nn.Module):
    """The Hugging Face spelling, over the first ``rotated`` channels."""

    def __init__(self, rotated: int, cut: int | None = None) -> None:
        super().__init__()
        self.rotated, self.cut = rotated, rotated // 2 if cut is None else cut

    def forward(self, x, cos, sin):
        head, tail = x[..., : self.rotated], x[..., self.rotated :]
        turned = torch.cat((-head[..., self.cut :], head[..., : self.cut]), dim=-1)
        out = head * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
        return torch.cat((out, tail), dim=-1) if tail.shape[-1] else out


class Pairs(torch.nn.Module):
    """The interleaved spelling."""

    def forward(self, x, cos, sin):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _inputs(heads: int, tokens: int, width: int, rotated: int):
    torch.manual_seed(0)
    x = torch.randn(1, heads, tokens, width)
    return x, torch.randn(1, tokens, rotated), torch.randn(1, tokens, rotated)


def _fuse(module, inputs):
    exported = torch.export.export(module, inputs)
    program = WorkingProgram(exported)
    report = Pipeline([FuseRotary()]).apply(program, verify=True, sample_inputs=inputs)
    return program, report["fuse-rotary"].log


def _count(program) -> int:
    return sum(is_call(node, "edgepass.rotary") for node in program.graph.nodes)


@settings(max_examples=12, deadline=None)
@given(heads=st.integers(1, 3), tokens=st.integers(2, 5), half=st.integers(1, 8))
def test_halves_become_one_operator(heads, tokens, half):
    program, _ = _fuse(Halves(2 * half), _inputs(heads, tokens, 2 * half, 2 * half))
    assert _count(program) == 1
    assert not any(is_call(node, "aten.cat") for node in program.graph.nodes)


@settings(max_examples=12, deadline=None)
@given(heads=st.integers(1, 3), half=st.integers(1, 4), rest=st.integers(1, 6))
def test_partial_rotation_keeps_the_tail(heads, half, rest):
    program, _ = _fuse(Halves(2 * half), _inputs(heads, 3, 2 * half + rest, 2 * half))
    (node,) = [n for n in program.graph.nodes if is_call(n, "edgepass.rotary")]
    assert node.args[0].meta["val"].shape[-1] == 2 * half + rest
    assert not any(is_call(n, "aten.cat") for n in program.graph.nodes)


def test_interleaved_pairs_become_one_operator():
    program, _ = _fuse(Pairs(), _inputs(2, 3, 8, 8))
    (node,) = [n for n in program.graph.nodes if is_call(n, "edgepass.rotary")]
    assert node.args[3] is True


def test_unequal_halves_are_refused():
    program, log = _fuse(Halves(8, cut=3), _inputs(1, 3, 8, 8))
    assert _count(program) == 0
    assert [refusal.reason for refusal in log.refusals] == [
        "the halves of 8 channels are cut as [:3] and [3:9223372036854775807]"
    ]


def test_angles_that_differ_by_head_are_refused():
    class PerHead(torch.nn.Module):
        def forward(self, x, cos, sin):
            turned = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
            return x * cos + turned * sin

    x = torch.randn(1, 2, 3, 4)
    program, log = _fuse(PerHead(), (x, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)))
    assert _count(program) == 0
    assert "expected [B, 1, S, 4]" in log.refusals[0].reason


@pytest.mark.parametrize("module", [Halves(8), Pairs()])
def test_a_second_run_changes_nothing(module):
    program, _ = _fuse(module, _inputs(2, 3, 8, 8))
    before = str(program.graph)
    report = Pipeline([FuseRotary()]).apply(program)
    assert not report["fuse-rotary"].log.changed
    assert str(program.graph) == before
