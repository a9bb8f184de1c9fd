"""The canonical form as a whole: same bits, nothing left over, a second run changes nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from edgepass.passes.canonicalize import Canonicalize
from tests.passes.programs import count, export, find, run_passes

# Each keeps or undoes itself in its own way; none changes a value of a float32 [2, 3, 4].
STEPS = {
    "cast": lambda x: x.to(torch.float32),
    "copy": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "one": lambda x: x * 1.0,
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "view": lambda x: x.view(2, 3, 4),
    "reshape twice": lambda x: x.reshape(6, 4).reshape(2, 3, 4),
    "transpose twice": lambda x: x.transpose(0, 2).transpose(0, 2),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.expand(2, 3, 4),
    "slice": lambda x: x[:, 0:],
}
KEPT = {"exp": torch.exp, "permute": lambda x: x.permute(0, 2, 1).exp().permute(0, 2, 1)}


def canonical(function, *inputs, **buffers):
    return run_passes([Canonicalize()], export(function, inputs, **buffers), inputs)


@given(names=st.lists(st.sampled_from([*STEPS, *KEPT]), min_size=1, max_size=6))
def test_generated_programs_keep_their_bits_and_lose_what_does_nothing(names) -> None:
    def forward(x):
        for name in names:
            x = (STEPS | KEPT)[name](x)
        return x.exp()

    x = torch.randn(2, 3, 4)
    program, _ = canonical(forward, x)
    assert torch.equal(program.to_exported().module()(x), forward(x))
    kept = 1 + sum(1 if name == "exp" else 3 for name in names if name in KEPT)
    assert sum(node.op == "call_function" for node in program.graph.nodes) <= kept


@given(names=st.lists(st.sampled_from([*STEPS, *KEPT]), min_size=1, max_size=6))
def test_a_second_run_changes_nothing(names) -> None:
    def forward(x):
        for name in names:
            x = (STEPS | KEPT)[name](x)
        return x.exp()

    x = torch.randn(2, 3, 4)
    program, _ = canonical(forward, x)
    before = str(program.graph)
    _, log = run_passes([Canonicalize()], program.to_exported(), (x,))
    assert not log.changed
    assert str(program.graph) == before


def test_quantized_parameters_become_plain_constants() -> None:
    linear = nn.Sequential(nn.Linear(32, 8, bias=False))
    quantize_(linear, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(16)))
    x = torch.randn(3, 32)
    program, log = run_passes([Canonicalize()], export(linear, (x,)), (x,))
    assert log.counts["unwrap-parameter"].applied == 3
    assert count(program, "export.access_subclass_inner_tensor") == 0
    names = [program.qualified_name(n) for n in program.placeholders if program.is_constant(n)]
    assert names == ["0.weight_qdata", "0.weight_scale", "0.weight_zero_point"]


def test_dead_calls_go_and_writes_stay() -> None:
    def forward(x, cache):
        x.sin().cos()
        cache.add_(x)
        return x + 1

    program, log = canonical(forward, torch.randn(2), cache=torch.zeros(2))
    assert log.counts["remove-dead-calls"].applied == 2
    assert (count(program, "aten.sin"), len(find(program, "aten.add_"))) == (0, 1)
