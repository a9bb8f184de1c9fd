"""Weight algorithms side by side: perplexity, time and bits a weight.

    python benchmarks/accuracy.py --text wiki.valid.raw
    python benchmarks/accuracy.py --text wiki.valid.raw --only gptq --mapping float_offset

All weights, the tied head and the embedding included, with 8-bit activations a token (8da4w). The
first ``--tokens`` tokens of the text are scored in windows of ``--context``, each from its second
token on; the last ``--calibration-tokens`` are calibrated on, and never scored. "recovered" is the
share of what torchao's plain rounding loses that an algorithm wins back. A group's scale counts 16
bits, as XNNPACK stores it, a float offset as many. A rotation goes before its algorithm:
``--only spinquant+rtn``.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from pathlib import Path
from typing import Any

import torch
from computed import Computed, compute_in_float
from torch import Tensor, nn
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.recipes import quantize_model
from edgepass.calibration.weight_rounding import NEED_STATISTICS
from edgepass.models.load import load_model
from edgepass.perplexity import of_model, perplexity
from measuring import machine, table

_CHUNK = 512
ALGORITHMS = ["rtn", "hqq", "mse", "seqmse", "gptq", "spinquant+rtn", "spinquant+gptq"]


def plain(weight: Tensor, group_size: int) -> Tensor:
    """torchao's plain rounding (SYMMETRIC: the scale is max / 7.5), dequantized."""
    scale, _ = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, (1, group_size), torch.int8, -8, 7, keepdim=True
    )
    groups = weight.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
    return (groups.round().clamp(-8, 7) * scale.unsqueeze(-1)).flatten(1)


def quantized(algorithm: str, model: Any, options: argparse.Namespace, chunks: Tensor) -> Any:
    """Quantize ``model`` by one algorithm and make it quick to run."""
    if algorithm == "float":
        return model
    if algorithm == "plain":
        with torch.no_grad():
            weights = {id(m.weight): m.weight for m in model.modules() if hasattr(m, "weight")}
            for weight in weights.values():
                if weight.dim() == 2:
                    weight.copy_(plain(weight, options.group_size))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Computed(module.weight))
        return model
    rotation, _, algorithm = algorithm.rpartition("+")
    recipe = find_recipe("8da4w").with_group_size(options.group_size).with_algorithm(algorithm)
    recipe = recipe.changed(
        weights=recipe.weights.changed(mapping=options.mapping), rotation=rotation or "none"
    )
    given = chunks if algorithm in NEED_STATISTICS else None
    return compute_in_float(quantize_model(model, recipe, chunks=given))


def bits(algorithm: str, options: argparse.Namespace) -> float:
    """Bits a weight, the encodings of its group included."""
    if algorithm == "float":
        return 32.0
    extra = 16 if options.mapping == "symmetric" or algorithm == "plain" else 32
    return 4 + extra / options.group_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--mapping", default="symmetric", help="symmetric or float_offset")
    parser.add_argument("--only", nargs="+", default=ALGORITHMS)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=64 * _CHUNK)
    options = parser.parse_args()
    rows: list[list[object]] = []
    found: dict[str, float] = {}
    for algorithm in ("float", "plain", *options.only):
        model, tokenizer = load_model(options.model, layers=options.layers)
        ids = tokenizer(options.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        chunks = torch.tensor(ids[-options.calibration_tokens :]).reshape(-1, _CHUNK)
        wall, cpu = time.perf_counter(), time.process_time()
        model = quantized(algorithm, model, options, chunks)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        scored = ids[: options.tokens]
        found[algorithm] = value = perplexity(scored, options.context, of_model(model)).perplexity
        loss = found.get("plain", value) - found["float"]
        recovered = f"{(found['plain'] - value) / loss:.0%}" if loss else ""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(
            [algorithm, f"{value:.2f}", recovered, bits(algorithm, options), wall, cpu, peak]
        )
        print(rows[-1], flush=True)
        del model
        gc.collect()
    print(f"\n{machine()}\n")
    header = ["algorithm", "perplexity", "recovered", "bits", "wall s", "CPU s", "peak MB so far"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
