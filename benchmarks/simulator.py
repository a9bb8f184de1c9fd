"""Perplexity of a Vulkan decoder in the simulator, beside the models that it should agree with.

    python benchmarks/simulator.py --text wiki.valid.raw
    python benchmarks/simulator.py --text wiki.valid.raw --folder out/vulkan --tokens 1024

For one token at a time the runtime reads activations as floats, so the program of ``--folder``
(default: lowered here) is run step by step and compared with the model whose linears hold the
dequantized weights. For several tokens at once it quantizes them: a program that returns every
token's logits is lowered here, run in chunks, and compared with the fused graph run eagerly.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from edgepass.calibration.recipes import quantize_model
from edgepass.generation import LoweredDecoder
from edgepass.lowering.vulkan import lower_vulkan
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.models.load import load_model
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.verification import run_program
from edgepass.perplexity import of_model, of_program, perplexity, read_tokens
from edgepass.simulator.simulate import SimulatedProgram
from measuring import machine, table


@dataclass(frozen=True)
class Row:
    """One perplexity, and the seconds that it took: by the clock, and of all processors."""

    what: str
    perplexity: float
    seconds: float
    cpu_seconds: float


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, tokenizer = self._load()
        self.tokens = read_tokens(tokenizer, options.text, options.tokens)

    def rows(self) -> list[Row]:
        """Take each perplexity. The model's weights are dequantized at the end."""
        found = self._several_tokens()
        found.append(self._take("simulator, one token at a time", self._steps()))
        dequantize_linears(self.model)
        found.append(self._take("eager, weights only", of_model(self.model)))
        return found

    def _load(self) -> tuple[Any, Any]:
        model, tokenizer = load_model(self.options.model, layers=self.options.layers)
        return quantize_model(model, self.options.recipe), tokenizer

    def _several_tokens(self) -> list[Row]:
        decoder = StaticCacheDecoder(self.model, self.options.context, all_logits=True)
        fused = fuse(export_decoder(decoder))
        simulated = SimulatedProgram(lower_vulkan(fused).buffer)
        chunk = self.options.chunk
        rows = [self._take(f"simulator, {chunk} tokens at a time", in_chunks(simulated.run, chunk))]
        # A copy's caches begin as zeros in each call, so that a window is one chunk.
        graph = WorkingProgram(fused)
        eager = in_chunks(lambda inputs: run_program(graph, inputs), self.options.context)
        return [*rows, self._take("eager, fused graph", eager)]

    def _steps(self) -> Callable[[list[int]], torch.Tensor]:
        if self.options.folder is not None:
            return of_program(LoweredDecoder(self.options.folder))
        decoder = StaticCacheDecoder(self.model, self.options.context)
        simulated = SimulatedProgram(lower_vulkan(fuse(export_decoder(decoder))).buffer)
        return in_chunks(simulated.run, 1)

    def _take(self, what: str, logits: Callable[[list[int]], torch.Tensor]) -> Row:
        started, busy = time.perf_counter(), time.process_time()
        result = perplexity(self.tokens, self.options.context, logits)
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
        return Row(what, result.perplexity, seconds, cpu)


def fuse(program: ExportedProgram) -> ExportedProgram:
    working = WorkingProgram(program)
    fusion_pipeline().apply(working)
    return working.to_exported()


def in_chunks(
    run: Callable[[list[torch.Tensor]], list[Any]], chunk: int
) -> Callable[[list[int]], torch.Tensor]:
    """Logits of a window from a program that returns those of each token it is given."""

    def logits(window: list[int]) -> torch.Tensor:
        given = window[:-1]
        parts = [
            run([torch.tensor([given[start : start + chunk]]), torch.tensor([start])])[0][0]
            for start in range(0, len(given), chunk)
        ]
        return torch.cat(parts)

    return logits


def dequantize_linears(model: torch.nn.Module) -> None:
    """Give each linear its dequantized weight, in place: float activations, int4 values."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight: Any = module.weight
            weight = getattr(weight, "original_weight_tensor", weight).dequantize()
            module.weight = torch.nn.Parameter(weight, requires_grad=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--folder", type=Path, help="a Vulkan folder of `edgepass lower`")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="8da4w")
    parser.add_argument("--layers", type=int, help="keep the first layers only")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--chunk", type=int, default=256, help="tokens run at once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = Bench(options).rows()
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(machine())
    print(
        table(
            ["what", "perplexity", "seconds", "CPU seconds"],
            [[*asdict(row).values()] for row in rows],
        )
    )
    several, fused, steps, weights = (row.perplexity for row in rows)
    for what, ratio in (("several tokens", several / fused), ("one token", steps / weights)):
        print(f"{what}: {100 * (ratio - 1):+.4f} % of the eager model's perplexity")


if __name__ == "__main__":
    main()
