"""Attention with capped scores, in the spellings of Gemma 2: fused, or refused with a reason."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.passes.attention import FuseCachedAttention
from edgepass.passes.canonicalize import Canonicalize
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.program import WorkingProgram
from tests.passes.test_attention import CONTEXT, Attention, _export, _fused, _inputs


class Capped(Attention):
    """Products, tanh, mask and softmax as ``transformers`` spells them."""

    cap, fill, scale = 5.0, torch.finfo(torch.float32).min, 0.5

    def forward(self, q, k, v, input_pos):
        tokens = input_pos + torch.arange(q.shape[2])
        mask = self.rows[None, :] <= tokens[:, None]
        if self.window:
            mask = mask & (self.rows[None, :] > tokens[:, None] - self.window)
        keys = self._repeat(self.k_cache.index_copy_(2, tokens, k))
        values = self._repeat(self.v_cache.index_copy_(2, tokens, v))
        scores = self.capped(torch.matmul(q, keys.transpose(2, 3)) * self.scale)
        weights = torch.softmax(self.masked(scores, mask), dim=-1, dtype=torch.float32)
        return torch.matmul(weights.to(q.dtype), values)

    def capped(self, scores):
        return torch.tanh(scores / self.cap) * self.cap

    def masked(self, scores, mask):
        if self.additive:
            return scores + torch.where(mask, 0.0, self.fill)[None, None]
        return scores.masked_fill(mask[None, None].logical_not(), self.fill)


def fuse(module, groups=2):
    program = WorkingProgram(_export(module, groups))
    report = Pipeline([Canonicalize(), FuseCachedAttention()]).apply(
        program, verify=True, sample_inputs=_inputs(groups=groups)
    )
    return program, report["fuse-cached-attention"].log


@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 3),
    window=st.sampled_from([0, 5, CONTEXT - 1]),
    additive=st.booleans(),
)
def test_both_masks_are_recognised(groups, window, additive):
    program, log = fuse(Capped(groups, window, additive), groups)
    (node,) = _fused(program)
    assert log.counts["capped-attention"].applied == 1
    assert node.args[4:] == (0.5, window, 5.0)


class TwoCaps(Capped):
    def capped(self, scores):
        return torch.tanh(scores / 5.0) * 4.0


class NoCap(Capped):
    def capped(self, scores):
        return scores


def test_another_factor_behind_the_tanh_is_no_cap():
    for module in (TwoCaps(), NoCap()):
        program, log = fuse(module)
        assert not _fused(program)
        assert log.counts["capped-attention"].applied == 0


class Shallow(Capped):
    fill = -50.0


class Unmasked(Capped):
    def masked(self, scores, mask):
        return scores.masked_fill(mask[None, None], self.fill)


class AddedTruth(Capped):
    def masked(self, scores, mask):
        return scores + mask[None, None]


class FilledNumbers(Capped):
    def masked(self, scores, mask):
        return scores.masked_fill(mask[None, None].float().logical_not(), self.fill)


class Holed(Capped):
    def masked(self, scores, mask):
        return super().masked(scores, mask & (self.rows[None, :] != 2))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Shallow(), "hidden scores become -50.0, expected at most -1e4"),
        (AddedTruth(), "is no mask to be added"),
        (FilledNumbers(), "is no mask to be filled"),
        (Holed(), "it is no causal mask"),
    ],
)
def test_near_misses_say_why(module, reason):
    program, log = fuse(module)
    assert not _fused(program)
    assert any(reason in each.reason for each in log.refusals)


def test_a_mask_the_other_way_round_is_not_taken():
    program, _ = fuse(Unmasked())
    assert not _fused(program)


def test_a_second_run_changes_nothing():
    program, _ = fuse(Capped())
    before = str(program.graph)
    assert not Pipeline([FuseCachedAttention()]).apply(program).passes[0].log.changed
    assert str(program.graph) == before
