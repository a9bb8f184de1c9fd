"""Attention over a static cache: recognised by what its mask computes, refused with a reason."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgepass.ops  # noqa: F401
from edgepass.passes.attention import FuseCachedAttention
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.positions import FoldPositions
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import is_call

CONTEXT = 16


class Attention(torch.nn.Module):
    """One attention over caches of 16 rows, with the parts that tests bend."""

    def __init__(self, groups=2, window=0, additive=False, shift=0, repeat=True, hole=False):
        super().__init__()
        self.groups, self.window, self.additive = groups, window, additive
        self.shift, self.repeat, self.hole = shift, repeat, hole
        self.register_buffer("k_cache", torch.zeros(1, 2, CONTEXT, 4))
        self.register_buffer("v_cache", torch.zeros(1, 2, CONTEXT, 4))
        self.register_buffer("rows", torch.arange(CONTEXT), persistent=False)

    def forward(self, q, k, v, input_pos):
        tokens = input_pos + torch.arange(q.shape[2])
        mask = self.rows[None, :] <= tokens[:, None]
        if self.window:
            mask = mask & (self.rows[None, :] > tokens[:, None] - self.window)
        if self.hole:
            mask = mask & (self.rows[None, :] != 3)
        if self.additive:
            mask = torch.where(mask, 0.0, -1e9)
        keys = self.k_cache.index_copy_(2, tokens + self.shift, k)
        values = self.v_cache.index_copy_(2, tokens + self.shift, v)
        if self.repeat:
            keys, values = (self._repeat(x) for x in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask[None, None], enable_gqa=not self.repeat
        )

    def _repeat(self, x):
        shape = (1, 2, self.groups, CONTEXT, 4)
        return x[:, :, None].expand(shape).reshape(1, 2 * self.groups, CONTEXT, 4)


def _inputs(tokens=5, groups=2, start=4):
    torch.manual_seed(1)
    k, v = torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4)
    return torch.randn(1, 2 * groups, tokens, 4), k, v, torch.tensor([start])


def _export(module, groups=2):
    size = torch.export.Dim("tokens", min=1, max=CONTEXT - 1)
    dynamic = ({2: size}, {2: size}, {2: size}, {})
    example = _inputs(groups=groups)
    return torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)


def _fuse(module, groups=2):
    program = WorkingProgram(_export(module, groups))
    inputs = _inputs(groups=groups)
    report = Pipeline([FuseCachedAttention()]).apply(program, verify=True, sample_inputs=inputs)
    return program, report["fuse-cached-attention"].log


def _fused(program):
    return [node for node in program.graph.nodes if is_call(node, "edgepass.cached_attention")]


@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 3),
    window=st.sampled_from([0, 1, 5, CONTEXT - 1]),
    additive=st.booleans(),
    repeat=st.booleans(),
)
def test_every_causal_spelling_is_recognised(groups, window, additive, repeat):
    program, _ = _fuse(Attention(groups, window, additive, repeat=repeat), groups)
    (node,) = _fused(program)
    assert node.args[5] == window
    assert not any(
        is_call(n, "aten.scaled_dot_product_attention", "aten.le") for n in program.graph.nodes
    )


def test_a_mask_with_a_hole_is_refused():
    program, log = _fuse(Attention(hole=True))
    assert not _fused(program)
    assert "it is no causal mask" in log.refusals[0].reason


def test_a_cache_written_elsewhere_is_refused():
    exported = _export(Attention(shift=1))
    program = WorkingProgram(exported)
    report = Pipeline([FuseCachedAttention()]).apply(program)
    assert not _fused(program)
    assert "it is not 0..15" in report["fuse-cached-attention"].log.refusals[0].reason


def test_a_mask_that_depends_on_data_is_refused():
    class Data(Attention):
        def forward(self, q, k, v, input_pos):
            tokens = input_pos + torch.arange(q.shape[2])
            mask = (self.rows[None, :] <= tokens[:, None]) & (q.sum() > -1e9)
            keys = self.k_cache.index_copy_(2, tokens, k)
            values = self.v_cache.index_copy_(2, tokens, v)
            return torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask[None, None], enable_gqa=True
            )

    program, log = _fuse(Data())
    assert not _fused(program)
    assert "depends on q: it is an input and no position" in log.refusals[0].reason


def test_a_second_run_changes_nothing():
    program, _ = _fuse(Attention())
    before = str(program.graph)
    assert not Pipeline([FuseCachedAttention()]).apply(program).passes[0].log.changed
    assert str(program.graph) == before


class Angles(Attention):
    """Attention whose query is scaled by a value of its position."""

    def __init__(self):
        super().__init__()
        self.register_buffer("speeds", torch.tensor([1.0, 0.5, 0.25, 0.1]), persistent=False)

    def forward(self, q, k, v, input_pos):
        tokens = (input_pos + torch.arange(q.shape[2])).float()
        angles = torch.cos(tokens[:, None] * self.speeds)
        return super().forward(q * angles, k, v, input_pos)


def test_angles_become_rows_of_a_table():
    program = WorkingProgram(_export(Angles()))
    passes = [FuseCachedAttention(), FoldPositions()]
    Pipeline(passes).apply(program, verify=True, sample_inputs=_inputs())
    (rows,) = [n for n in program.graph.nodes if is_call(n, "edgepass.position_rows")]
    table = program.constant(rows.args[0])
    wanted = torch.cos(
        torch.arange(CONTEXT).double()[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.1])
    )
    assert (table - wanted).abs().max() < 1e-6
    assert not any(is_call(n, "aten.cos") for n in program.graph.nodes)


class HiddenColumn(Attention):
    """A value of the last token's position, in some columns, beside one that hides its column."""

    hides = torch.finfo(torch.float32).min

    def forward(self, q, k, v, input_pos):
        tokens = (input_pos + torch.arange(q.shape[2])).float()
        behind = tokens - tokens[-1:]
        bias = torch.stack([torch.full_like(behind, self.hides), *[behind] * 3], -1)
        return super().forward(q.maximum(bias), k, v, input_pos)


class InfiniteColumn(HiddenColumn):
    hides = -torch.inf


class Distances(Attention):
    """A value that has a column for each token of the call."""

    def forward(self, q, k, v, input_pos):
        tokens = (input_pos + torch.arange(q.shape[2])).float()
        near = (tokens[None, :] - tokens[:, None]).clamp(max=0.0).exp()
        return super().forward(near @ q, k, v, input_pos)


@pytest.mark.parametrize("module", [HiddenColumn, InfiniteColumn, Distances])
def test_a_row_that_changes_with_the_tokens_beside_it_is_no_table(module):
    program = WorkingProgram(_export(module()))
    report = Pipeline([FuseCachedAttention(), FoldPositions()]).apply(program)
    count = report["fold-positions"].log.counts["fold-positions"]
    assert (count.tried, count.refused, count.applied) == (1, 1, 0)
    assert not any(is_call(n, "edgepass.position_rows") for n in program.graph.nodes)


def test_a_hidden_column_does_not_keep_rows_out_of_a_table():
    class Rows(HiddenColumn):
        def forward(self, q, k, v, input_pos):
            tokens = (input_pos + torch.arange(q.shape[2])).float()
            bias = torch.stack([torch.full_like(tokens, self.hides), *[tokens.cos()] * 3], -1)
            return Attention.forward(self, q.maximum(bias), k, v, input_pos)

    program = WorkingProgram(_export(Rows()))
    passes = [FuseCachedAttention(), FoldPositions()]
    Pipeline(passes).apply(program, verify=True, sample_inputs=_inputs())
    assert sum(is_call(n, "edgepass.position_rows") for n in program.graph.nodes) == 1
