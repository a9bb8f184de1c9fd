"""What calibrating costs beside the plain forward of the same tokens.

    python benchmarks/calibration.py --layers 4 --chunk 512 --chunks 2 --rounds 3
    python benchmarks/calibration.py --text wiki.valid.raw --chunk 512 --chunks 8 --rounds 1

In turn in one process, on the chunk graph of a static QNN recipe:

- the model's own fp32 forward, and the exported graph without observers;
- edgepass as a whole (observing the weights, one pass a chunk, filling the observers): without and
  with a checkpoint, and by histograms;
- the stock observers run one by one;
- a loop over the AR-1 graph with stock observers, ``--steps`` tokens of it, scaled up.

Export and preparation are not counted. Ratios are to the model's own forward, medians of the ratios
of one round each; CPU seconds carry further than wall seconds on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.chunks import read_chunks
from edgepass.calibration.observe import observe
from edgepass.calibration.recipe_file import find_recipe
from edgepass.calibration.recipe_observers import MinMax, Percentile
from edgepass.models.cache_decoder import CacheIoDecoder, export_form
from edgepass.models.load import load_model
from measuring import Usage, machine, measured, paired_ratio, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recipe", default="16a4w_block")
    parser.add_argument("--text", type=Path, help="else random tokens")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens of the loop; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="these contestants (and the forward)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contestants = _contestants(options)
    for run in contestants.values():
        run()
    samples: dict[str, list[Usage]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, run in contestants.items():
            with torch.no_grad(), measured() as usage:
                run()
            samples[name].append(usage)
    _show(options, samples)


def _contestants(options: Any) -> dict[str, Callable[[], Any]]:
    from edgepass.lowering.qnn_libraries import prepare_libraries

    prepare_libraries()
    from edgepass.lowering.qnn_quantizer import RANGE_OBSERVERS, QnnQuantization
    from edgepass.lowering.qnn_recipes import find_chip, find_qnn_recipe

    model, tokenizer = load_model(options.model, layers=options.layers)
    chunks = _chunks(options, model, tokenizer)
    decoder = CacheIoDecoder(model, options.chunk)
    form = decoder.form(options.chunk, options.chunk)
    program = export_form(form)
    plain: Any = program.module(check_guards=False)

    @cache
    def prepared(observer: Any, program: Any = program) -> Any:
        recipe = find_qnn_recipe(find_recipe(options.recipe).changed(observer=observer))
        return QnnQuantization(recipe, find_chip("SM8650")).prepare(program)

    extremes = prepared(MinMax(kind="min_max"))

    def calibrate(graph: Any, **kept: Any) -> None:
        _forget_weights(graph)
        calibration = Calibration(**kept)
        calibration.run(graph, list(chunks), form.inputs, RANGE_OBSERVERS)

    def resumable() -> None:
        with tempfile.TemporaryDirectory() as folder:
            calibrate(extremes, checkpoint=Path(folder))

    def stock() -> None:
        _forget_weights(extremes)
        observe(extremes, (form.inputs(chunk) for chunk in chunks))

    found = {
        "forward": lambda: [model(chunk[None], use_cache=False) for chunk in chunks],
        "graph without observers": lambda: [plain(*form.inputs(chunk)) for chunk in chunks],
        "edgepass": lambda: calibrate(extremes),
        "edgepass with checkpoint": resumable,
        "edgepass, percentile": lambda: calibrate(prepared(Percentile(kind="percentile"))),
        "stock observers": stock,
    }
    if options.steps:
        step = decoder.form(1)
        single = prepared(MinMax(kind="min_max"), export_form(step))
        inputs = [
            step.inputs(chunks[0, i : i + 1], options.chunk - options.steps + i)
            for i in range(options.steps)
        ]
        found["token by token"] = lambda: observe(single, inputs)
    if options.only:
        found = {name: run for name, run in found.items() if name in ("forward", *options.only)}
    return found


def _forget_weights(graph: Any) -> None:
    """Let observers that look at a weight but once do so again."""
    for observer in graph.modules():
        if hasattr(observer, "calibrated"):
            observer.calibrated = False


def _chunks(options: Any, model: Any, tokenizer: Any) -> torch.Tensor:
    if options.text is not None:
        return read_chunks(tokenizer, options.text, options.chunk, options.chunks)
    generator = torch.Generator().manual_seed(0)
    size = (options.chunks, options.chunk)
    return torch.randint(model.config.vocab_size, size, generator=generator)


def _show(options: Any, samples: dict[str, list[Usage]]) -> None:
    tokens = options.chunk * options.chunks
    results, forward = {}, samples["forward"]
    for name, usages in samples.items():
        scale = tokens / options.steps if name == "token by token" else 1
        cpu = [scale * each.cpu_seconds for each in usages]
        wall = [scale * each.wall_seconds for each in usages]
        results[name] = {
            "cpu_s": statistics.median(cpu),
            "wall_s": statistics.median(wall),
            "cpu_ratio": paired_ratio(cpu, [each.cpu_seconds for each in forward]),
            "wall_ratio": paired_ratio(wall, [each.wall_seconds for each in forward]),
            "peak_mb": max(each.peak_rss_bytes for each in usages) / 1e6,
        }
    print(json.dumps({"tokens": tokens, "results": results}))
    print(f"\n{machine()}\n")
    header = ["", "CPU s", "wall s", "CPU / forward", "wall / forward", "peak MB"]
    print(table(header, [[name, *row.values()] for name, row in results.items()]))


if __name__ == "__main__":
    main()
