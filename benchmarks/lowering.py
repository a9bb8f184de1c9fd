"""Time from an exported program to ``.pte`` bytes: ExecuTorch's stock flow and edgepass in turn.

    python benchmarks/lowering.py --layers 2 4 8 --backends xnnpack vulkan
    python benchmarks/lowering.py --layers 30 --flows edgepass

Each measurement is a process of its own. It loads the checkpoint, cuts it to the first layers,
quantizes and exports it (not timed; a digest of the graph shows that both flows were given the
same program), and then lowers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from measuring import fitted_exponent, in_fresh_process, machine, measured, table

FLOWS = ("stock", "edgepass")
BACKENDS = ("xnnpack", "vulkan")
# Imported before the clock starts: importing the stack costs seconds, whoever uses it.
MODULES = {
    "xnnpack": ("executorch.backends.xnnpack.partition.xnnpack_partitioner",),
    "vulkan": ("executorch.backends.vulkan.partitioner.vulkan_partitioner",),
    "stock": ("executorch.exir",),
    "edgepass": ("edgepass.api", "edgepass.lowering.xnnpack", "edgepass.lowering.vulkan_backend"),
}


def exported_program(model: str, layers: int, context: int, group_size: int) -> Any:
    """Return the decoder's exported program: 8da4w linears, KV caches inside, dynamic tokens."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    from edgepass.models.decoder import StaticCacheDecoder, export_decoder
    from edgepass.models.load import load_model

    decoder = load_model(model, layers=layers)[0]
    weight = PerGroup(group_size)
    quantize_(decoder, Int8DynamicActivationIntxWeightConfig(torch.int4, weight))
    return export_decoder(StaticCacheDecoder(decoder, context))


def stock_flow(program: Any, backend: str) -> tuple[bytes, int]:
    """Lower as ExecuTorch's own examples do; return the bytes and the number of delegates."""
    from executorch.exir import to_edge_transform_and_lower

    manager = to_edge_transform_and_lower(program, partitioner=stock_partitioners(backend))
    executorch = manager.to_executorch()
    graph = executorch.exported_program().graph
    delegates = sum("executorch_call_delegate" in str(node.target) for node in graph.nodes)
    return executorch.buffer, delegates


def stock_partitioners(backend: str) -> list[Any]:
    if backend == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return [VulkanPartitioner()]
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )

    return [XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()]


def edgepass_flow(program: Any, backend: str) -> tuple[bytes, int]:
    import edgepass

    result = edgepass.lower(program, backend=backend)
    return result.buffer, sum(result.report["delegates"].values())


def measure(flow: str, backend: str, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Lower once in this process and return what it cost."""
    program = exported_program(options.model, layers, options.context, options.group_size)
    code = program.graph_module.code
    lower: Callable[[Any, str], tuple[bytes, int]] = {
        "stock": stock_flow,
        "edgepass": edgepass_flow,
    }[flow]
    nodes = len(program.graph.nodes)
    for module in (*MODULES[flow], *MODULES[backend]):
        import_module(module)
    with measured() as usage:
        buffer, delegates = lower(program, backend)
    return {
        "flow": flow,
        "backend": backend,
        "layers": layers,
        "wall_seconds": usage.wall_seconds,
        "cpu_seconds": usage.cpu_seconds,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "delegates": delegates,
        "pte_bytes": len(buffer),
        "nodes": nodes,
        "program": hashlib.sha256(code.encode()).hexdigest()[:12],
    }


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every measurement in a fresh process, the flows in turn; print each as it ends."""
    shared = ["--model", options.model, "--context", str(options.context)]
    shared += ["--group-size", str(options.group_size)]
    rows = []
    for backend in options.backends:
        for layers in options.layers:
            for round_index in range(options.rounds):
                for flow in options.flows:
                    one = ["--flows", flow, "--backends", backend, "--layers", str(layers)]
                    row = in_fresh_process(__file__, [*one, *shared]) | {"round": round_index}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    save(rows, options.json)
    return rows


def save(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write what was measured so far, so that a long run that is stopped leaves its results."""
    if path:
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown tables: every case, then ratio and exponent a backend."""
    header = ["backend", "layers", "flow", "wall s", "CPU s", "peak MB", "delegates", ".pte MB"]
    cases = [
        [
            *(row[key] for key in ("backend", "layers", "flow", "wall_seconds", "cpu_seconds")),
            row["peak_rss_bytes"] / 1e6,
            row["delegates"],
            row["pte_bytes"] / 1e6,
        ]
        for row in rows
    ]
    return "\n\n".join([table(header, cases), *comparisons(rows)])


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """Return, where both flows ran, the table of ratios, and in any case that of exponents."""
    cost = {(r["backend"], r["layers"], r["round"], r["flow"]): r for r in rows}
    ratios = [
        [*key[:2], *(stock[f"{unit}_seconds"] / row[f"{unit}_seconds"] for unit in ("wall", "cpu"))]
        for key, row in cost.items()
        if key[3] == "edgepass" and (stock := cost.get((*key[:3], "stock")))
    ]
    exponents = []
    for backend, flow in sorted({(r["backend"], r["flow"]) for r in rows}):
        mine = [r for r in rows if (r["backend"], r["flow"]) == (backend, flow)]
        sizes = [r["layers"] for r in mine]
        if len(set(sizes)) > 1:
            exponents.append(
                [backend, flow, fitted_exponent(sizes, [r["cpu_seconds"] for r in mine])]
            )
    tables = [
        (["backend", "layers", "stock / edgepass, wall", "CPU"], ratios),
        (["backend", "flow", "CPU s grows with layers to the power"], exponents),
    ]
    return [table(header, body) for header, body in tables if body]


def refuse_unequal_programs(rows: list[dict[str, Any]]) -> None:
    """Raise RuntimeError when two flows of one size did not get the same exported program."""
    programs: dict[int, set[str]] = {}
    for row in rows:
        programs.setdefault(row["layers"], set()).add(row["program"])
    unequal = {layers: found for layers, found in programs.items() if len(found) > 1}
    if unequal:
        raise RuntimeError(f"the flows were given different programs: got {unequal}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each case")
    parser.add_argument("--json", type=Path, help="write the raw measurements here")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.result:  # the measuring process of in_fresh_process
        case = options.flows[0], options.backends[0], options.layers[0]
        options.result.write_text(json.dumps(measure(*case, options)))
        return
    rows = measure_all(options)
    refuse_unequal_programs(rows)
    print(f"\n{machine()}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()
