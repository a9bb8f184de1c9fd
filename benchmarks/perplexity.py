"""Perplexity of the quantized model: unfused, fused, and as an XNNPACK program.

    python benchmarks/perplexity.py --text wiki.valid.raw --folder out/xnnpack --tokens 4096

Windows of the context, each scored from its second token on. The unfused model is torchao's own
quantized module, the fused one the graph of the passes with logits of every token, both eager; the
folder's program is run one token at a time. XNNPACK keeps weight scales in bfloat16: the fourth row
is the fused graph with such scales.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from edgepass.calibration.recipes import quantize_model
from edgepass.generation import LoweredDecoder
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.models.load import load_model
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.verification import run_program
from edgepass.perplexity import WindowLogits, of_model, of_program, perplexity, read_tokens
from measuring import machine, table


def of_graph(program: ExportedProgram) -> WindowLogits:
    """Logits of a decoder's graph that returns those of every token, run eagerly in one call."""
    working = WorkingProgram(program)

    def logits(window: list[int]) -> torch.Tensor:
        return run_program(working, (torch.tensor([window[:-1]]), torch.tensor([0])))[0][0]

    return logits


def round_scales(program: ExportedProgram) -> ExportedProgram:
    """Round the scales of every linear's weight to bfloat16, in place."""
    for name, tensor in program.state_dict.items():
        if name.endswith("scale") and tensor.dim() == 2:
            program.state_dict[name] = tensor.bfloat16().to(tensor.dtype)
    return program


def subjects(options: argparse.Namespace, model: Any) -> dict[str, WindowLogits]:
    """Return what predicts tokens, by the name that the table gives it."""
    found = {"eager, unfused": of_model(model)}
    decoder = StaticCacheDecoder(model, options.context, all_logits=True)
    fused = fusion_pipeline().run(export_decoder(decoder)).program
    found["eager, fused"] = of_graph(fused)
    if options.folder is not None:
        found["XNNPACK program, stock runtime"] = of_program(LoweredDecoder(options.folder))
        found["eager, fused, bfloat16 scales"] = of_graph(round_scales(fused))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="8da4w")
    parser.add_argument("--folder", type=Path, help="a lowered folder for XNNPACK")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    tokens = read_tokens(tokenizer, options.text, options.tokens)
    quantize_model(model, options.recipe)
    rows: list[list[object]] = []
    for name, logits in subjects(options, model).items():
        started = time.perf_counter()
        value = perplexity(tokens, options.context, logits).perplexity
        first = float(str(rows[0][1])) if rows else value
        change = 100 * (value / first - 1)
        rows.append([name, f"{value:.4f}", f"{change:+.3f} %", time.perf_counter() - started])
        print(rows[-1], flush=True)
    print(f"\n{machine()}\n")
    print(table(["", "perplexity", "to the first", "seconds"], rows))


if __name__ == "__main__":
    main()
