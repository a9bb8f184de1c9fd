"""Time of matching and rewriting by graph size, beside torch's ``SubgraphMatcher``.

    python benchmarks/passes.py --nodes 1000 10000 100000

The graph is an exported quantized decoder block (8da4w, two norms, seven linears, rotary
embedding), copied end to end with constants of its own for each copy. edgepass runs its passes
over it, matching and rewriting; ``fuse-quantized-linear`` packs the weights, too, which is timed
once more on its own. ``SubgraphMatcher`` only matches, and only RMSNorm's pattern, beside
edgepass's rule for it; both must find every norm.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from measuring import fitted_exponent, machine, table

HIDDEN, HEAD = 64, 16


class RmsNorm(torch.nn.Module):
    """As Llama spells it, with the casts that export leaves in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(x.to(torch.float32), x.dtype)

    def normed(self, wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(dtype)


class WideRmsNorm(RmsNorm):
    """RMSNorm behind its first cast, which others read too: torch's matcher refuses that node."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(x, torch.float32)


class Block(torch.nn.Module):
    """A decoder block without its attention product: norm, projections, rotary, MLP."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q", "k", "v", "o", "gate", "up", "down")
        linears = {name: torch.nn.Linear(HIDDEN, HIDDEN, bias=False) for name in names}
        self.linears = torch.nn.ModuleDict(linears)
        self.norms = torch.nn.ModuleList([RmsNorm(), RmsNorm()])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        q, k, v = (self._heads(self.linears[name](h)) for name in ("q", "k", "v"))
        mixed = self._turned(q, cos, sin) + self._turned(k, cos, sin) + v
        x = x + self.linears["o"](mixed.transpose(1, 2).reshape(x.shape))
        h = self.norms[1](x)
        gated = torch.nn.functional.silu(self.linears["gate"](h)) * self.linears["up"](h)
        return x + self.linears["down"](gated)

    @staticmethod
    def _heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, HEAD).transpose(1, 2)

    @staticmethod
    def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


def exported_block() -> ExportedProgram:
    """Return one quantized block with a dynamic number of tokens."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    block = Block().eval()
    quantize_(block, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    inputs = (torch.randn(1, 5, HIDDEN), torch.randn(1, 5, HEAD), torch.randn(1, 5, HEAD))
    tokens = torch.export.Dim("tokens", min=2, max=128)
    with torch.no_grad():
        return torch.export.export(block, inputs, dynamic_shapes=({1: tokens},) * 3)


def chain(block: ExportedProgram, copies: int) -> ExportedProgram:
    """Return ``copies`` of the block, each reading the one before, with constants of their own."""
    graph, state, specs = Graph(), {}, []
    specs_of = {spec.arg.name: spec for spec in block.graph_signature.input_specs}
    nodes = list(block.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    taken = [node for node in inputs if specs_of[node.name].kind is InputKind.USER_INPUT]
    constants = [node for node in inputs if node not in taken]
    maps: list[dict[Node, Node]] = []
    for index in range(copies):
        maps.append({})
        for node in constants:
            new = maps[-1][node] = graph.node_copy(node)
            new.target = new.name
            spec = specs_of[node.name]
            target = f"layers.{index}.{spec.target}"
            state[target] = varied(block.state_dict[spec.target])
            argument = TensorArgument(name=new.name)
            specs.append(InputSpec(spec.kind, argument, target, spec.persistent))
    outer = {node: graph.node_copy(node) for node in taken}
    for node in taken:
        argument = TensorArgument(name=outer[node].name)
        specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    for values in maps:
        values.update(outer)
        for node in nodes:
            if node.op == "call_function":
                values[node] = graph.node_copy(node, values.__getitem__)
        outer[taken[0]] = values[nodes[-1].args[0][0]]
    last = outer[taken[0]]
    graph.output((last,))
    return program_of(block, graph, state, specs, last)


def varied(tensor: Any) -> Any:
    """Return a random tensor of the same form, so that no two copies have equal constants."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = {name: getattr(tensor, name).clone() for name in names}
        inner["qdata"].random_(-8, 8)
        inner["scale"].uniform_(0.01, 0.02)
        new = type(tensor).__tensor_unflatten__(inner, context, None, None)
        return torch.nn.Parameter(new, requires_grad=False)
    return torch.nn.Parameter(torch.randn_like(tensor))


def program_of(
    block: ExportedProgram, graph: Graph, state: dict[str, Any], specs: list[Any], last: Node
) -> ExportedProgram:
    output = OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=last.name), None)
    return ExportedProgram(
        root=GraphModule(torch.nn.Module(), graph),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, [output]),
        state_dict=state,
        range_constraints=block.range_constraints,
        module_call_graph=list(block.module_call_graph),
        constants={},
        verifiers=block.verifiers,
    )


def edgepass_seconds(program: ExportedProgram) -> dict[str, float]:
    """Return the CPU seconds of each pass over a fresh copy, and of making the copy."""
    from edgepass.ops import pack_int4
    from edgepass.passes.canonicalize import Canonicalize
    from edgepass.passes.program import WorkingProgram
    from edgepass.passes.quantized_embedding import FuseQuantizedEmbedding
    from edgepass.passes.quantized_linear import FuseQuantizedLinear, ShareActivationQuantization
    from edgepass.passes.rms_norm import FuseRmsNorm
    from edgepass.passes.rope import FuseRotary

    passes = [Canonicalize(), FuseRotary(), FuseRmsNorm(), ShareActivationQuantization()]
    passes += [FuseQuantizedLinear(), FuseQuantizedEmbedding()]
    working, copied = timed(lambda: WorkingProgram(program))
    logs, seconds = {}, {}
    for each in passes:
        logs[each.name], seconds[each.name] = timed(lambda each=each: each.run(working))
    _check(logs, program)
    weights = [p.qdata for p in program.state_dict.values() if hasattr(p, "qdata")]
    packing = timed(lambda: [pack_int4(weight) for weight in weights])[1]
    total = sum(seconds.values())
    return {
        "copy the program": copied,
        **seconds,
        "all passes": total,
        "packing the weights": packing,
        "all passes less packing": total - packing,
    }


def _check(logs: dict[str, Any], program: ExportedProgram) -> None:
    """Every norm, rotary and linear must have been fused: a fast miss would not count."""
    targets = [str(node.target) for node in program.graph.nodes]
    wanted = {
        ("fuse-rms-norm", "composed-rms-norm"): targets.count("aten.rsqrt.default"),
        ("fuse-rotary", "rotate-halves"): targets.count("aten.neg.default"),
        ("fuse-quantized-linear", "dynamically-quantized-linear"): targets.count(
            "aten.linear.default"
        ),
    }
    for (graph_pass, rule), count in wanted.items():
        applied = logs[graph_pass].counts[rule].applied
        if applied != count:
            raise SystemExit(f"{rule} was applied {applied} times, expected {count}")


def matching_seconds(program: ExportedProgram) -> dict[str, float]:
    """Return the seconds of finding every norm: with torch's matcher, and with edgepass's rule."""
    from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

    from edgepass.passes.matching import Match
    from edgepass.passes.program import WorkingProgram
    from edgepass.passes.rms_norm import ComposedRmsNorm
    from edgepass.passes.rule import CompiledRule

    example = torch.export.export(WideRmsNorm(), (torch.randn(2, 3, HIDDEN),)).graph
    _drop_assertions(example)
    graph = copy.deepcopy(program.graph)
    _drop_assertions(graph)
    matcher = SubgraphMatcher(example, ignore_literals=True)
    found, theirs = timed(lambda: matcher.match(graph))
    working, rule = WorkingProgram(program), CompiledRule(ComposedRmsNorm())
    anchors = [node for node in working.graph.nodes if str(node.target) == "aten.mul.Tensor"]
    ours, seconds = timed(lambda: [rule.match(node, working) for node in anchors])
    norms = sum(str(node.target) == "aten.rsqrt.default" for node in working.graph.nodes)
    matches = sum(isinstance(each, Match) for each in ours)
    if (len(found), matches) != (norms, norms):
        raise SystemExit(f"found {len(found)} and {matches} norms, expected {norms}")
    return {"SubgraphMatcher": theirs, "edgepass's rule": seconds}


def _drop_assertions(graph: Graph) -> None:
    for node in list(graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``run`` returns and its CPU seconds, the garbage collector paused."""
    gc.collect()
    gc.disable()  # as a pipeline does: it would walk the whole graph again and again
    started = time.process_time()
    result = run()
    seconds = time.process_time() - started
    gc.enable()
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3, help="the best of these is shown")
    arguments = parser.parse_args()
    import edgepass.ops  # noqa: F401  registers the operators

    torch.set_num_threads(1)
    block = exported_block()
    size = sum(node.op == "call_function" for node in block.graph.nodes)
    sizes, rows = [], []
    for nodes in arguments.nodes:
        program = chain(block, max(1, nodes // size))
        sizes.append(len(program.graph.nodes))
        samples = [
            edgepass_seconds(program) | matching_seconds(program) for _ in range(arguments.rounds)
        ]
        rows.append({name: min(each[name] for each in samples) for name in samples[0]})
    print(f"{machine()}\n\n{summary(sizes, rows)}")


def summary(sizes: list[int], rows: list[dict[str, float]]) -> str:
    """Return the Markdown table of CPU microseconds a node, with the exponent of each line."""
    lines = [
        [
            name,
            *(row[name] / size * 1e6 for size, row in zip(sizes, rows, strict=True)),
            fitted_exponent(sizes, [row[name] for row in rows]),
        ]
        for name in rows[0]
    ]
    return table(["us a node at nodes:", *map(str, sizes), "exponent"], lines)


if __name__ == "__main__":
    main()
