"""QNN: what calibrating on the chunk costs and keeps, and what the HTP simulator makes of it.

    python benchmarks/qnn.py calibration --layers 2 --tokens 512
    python benchmarks/qnn.py accuracy --layers 2 --recipe 16a4w_block --text wiki.valid.raw
    python benchmarks/qnn.py whole --recipe 16a4w_block --text wiki.valid.raw --out out/qnn
    python benchmarks/qnn.py perplexity --tokens 512 --scored 2048 --text wiki.valid.raw

``calibration``: one pass over the chunk against the loop over an AR-1 graph, same tokens, same
observers, CPU and wall seconds, in turn. ``accuracy``: a decode of 64 steps behind the chunk's rows
and behind an AR-N prefill, with encodings of the chunk and with the AR-1 graph's own, against the
float model (with ``--float64-sums`` without the rounding errors of sums, which differ between one
token and many); the simulator against the fake-quantized graph. ``whole``: all layers lowered once,
tokens generated in the simulator. ``perplexity``: of the fake-quantized chunk graph and of the
float model; nothing is lowered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from edgepass.calibration.observe import observe
from edgepass.models.cache_decoder import CacheIoDecoder, DecoderForm, export_form
from edgepass.models.load import load_model
from edgepass.ops.float64_sums import Float64Sums
from edgepass.passes.quantized_values import read_encodings
from edgepass.passes.verification import signal_to_noise_db
from edgepass.perplexity import of_model, perplexity, read_tokens
from edgepass.qnn import QnnOptions, cut_texts, lower_for_qnn
from measuring import measured

PREFIX = "decoder.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["calibration", "accuracy", "whole", "perplexity"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recipe", default="16a4w_block")
    parser.add_argument("--kv-bits", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--scored", type=int, default=2048, help="perplexity: the first tokens")
    parser.add_argument("--calibrated", type=int, default=2048, help="perplexity: those behind")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--no-device", action="store_true", help="accuracy: do not lower")
    parser.add_argument(
        "--float64-sums", action="store_true", help="accuracy: sum without rounding"
    )
    parser.add_argument("--out", type=Path, default=Path("out/qnn"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    measures = {
        "calibration": calibration,
        "accuracy": accuracy,
        "whole": whole,
        "perplexity": chunk_perplexity,
    }
    print(json.dumps(measures[options.what](options), indent=1))


def chosen_quantization(options: Any) -> Any:
    from edgepass.lowering.qnn_libraries import prepare_libraries
    from edgepass.lowering.qnn_quantizer import QnnQuantization
    from edgepass.lowering.qnn_recipes import find_chip, find_qnn_recipe

    prepare_libraries()
    return QnnQuantization(find_qnn_recipe(options.recipe), find_chip("SM8650"), options.kv_bits)


def prepared_decoder(options: Any) -> tuple[Any, Any, CacheIoDecoder, torch.Tensor]:
    quantization = chosen_quantization(options)
    model, tokenizer = load_model(options.model, layers=options.layers)
    if options.text is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (options.tokens,), generator=generator)
    else:
        ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
        tokens = torch.tensor(ids[: options.tokens])
    return model, quantization, CacheIoDecoder(model, options.tokens), tokens


def step_by_step(
    form: DecoderForm, run: Callable[..., Any], tokens: torch.Tensor, rows: Any, start: int
) -> torch.Tensor:
    """Logits ``[S - start, V]`` of AR-1 calls from ``start`` on, ``rows`` filling the caches."""
    caches, layers = [each.clone() for each in form.empty_caches()], form.decoder.layers
    for i, (cache, new) in enumerate(zip(caches, rows, strict=True)):
        cache.narrow(3 if i < layers else 2, 0, start).copy_(
            new.narrow(3 if i < layers else 2, 0, start)
        )
    logits = []
    for position in range(start, len(tokens)):
        out = run(*form.inputs(tokens[position : position + 1], position, caches))
        logits.append(out[0][0])
        for i, (cache, new) in enumerate(zip(caches, out[1:], strict=True)):
            if position < form.past:
                cache.narrow(3 if i < layers else 2, position, 1).copy_(new)
    return torch.cat(logits)


def prefilled(
    form: DecoderForm, run: Callable[..., Any], tokens: torch.Tensor, count: int
) -> list[torch.Tensor]:
    """The rows of the first ``count`` tokens by AR-N calls, keys of each layer, then values."""
    caches, layers = [each.clone() for each in form.empty_caches()], form.decoder.layers
    axes = [3] * layers + [2] * layers
    for start in range(0, count, form.tokens):
        size = min(form.tokens, count - start)
        out = run(*form.inputs(tokens[start : start + size], start, caches))
        for axis, cache, new in zip(axes, caches, out[1:], strict=True):
            cache.narrow(axis, start, size).copy_(new.narrow(axis, 0, size))
    return [each.narrow(axis, 0, count) for axis, each in zip(axes, caches, strict=True)]


def timed(work: Callable[[], Any]) -> dict[str, float]:
    with torch.no_grad(), measured() as usage:
        work()
    return {"wall_s": round(usage.wall_seconds, 3), "cpu_s": round(usage.cpu_seconds, 3)}


def calibration(options: Any) -> dict[str, Any]:
    """Observers only, export and conversion aside, in turn."""
    _, quantization, decoder, tokens = prepared_decoder(options)
    chunk, step = decoder.form(len(tokens), len(tokens)), decoder.form(1)
    whole = quantization.prepare(export_form(chunk))
    single = quantization.prepare(export_form(step))
    empty = step.empty_caches()
    whole(*chunk.inputs(tokens))  # warm up
    single(*step.inputs(tokens[:1]))
    fast = timed(lambda: observe(whole, [chunk.inputs(tokens)]))
    slow = timed(lambda: step_by_step(step, single, tokens, empty, 0))
    return {
        "tokens": len(tokens),
        "layers": decoder.layers,
        "chunk": fast,
        "token_by_token": slow,
        "times_as_fast_wall": round(slow["wall_s"] / fast["wall_s"], 1),
        "times_as_fast_cpu": round(slow["cpu_s"] / fast["cpu_s"], 1),
    }


def accuracy(options: Any) -> dict[str, Any]:
    from edgepass.lowering.qnn_check import device_sqnr_db
    from edgepass.lowering.qnn_decoder import DECODE_METHOD, PREFILL_METHOD, quantize_decoder
    from edgepass.lowering.qnn_lowering import lower_graphs

    model, quantization, decoder, tokens = prepared_decoder(options)
    form, start = decoder.form(1), len(tokens) - 64
    own = quantization.prepare(export_form(form))
    with torch.no_grad(), Float64Sums() if options.float64_sums else nullcontext():
        found = quantize_decoder(decoder, quantization, [tokens], options.chunk)
        step = found.graphs[DECODE_METHOD]
        exact = model(tokens[None]).logits[0, start:]
        whole = found.chunk_graph(*found.chunk.inputs(tokens))
        step_by_step(form, own, tokens, form.empty_caches(), 0)
        calibrated = quantization.convert(own)
        moved = step_by_step(form, step, tokens, whole[1:], start)
        itself = step_by_step(form, calibrated, tokens, whole[1:], start)
        rows = prefilled(found.forms[PREFILL_METHOD], found.graphs[PREFILL_METHOD], tokens, start)
        behind_prefill = step_by_step(form, step, tokens, rows, start)
    joins = _joins(calibrated)
    differing = found.encodings.diff(read_encodings(calibrated, PREFIX, joins), 1e-4)
    device: dict[str, Any] = {}
    if not options.no_device:
        inputs = {n: f.inputs(tokens[: f.tokens]) for n, f in found.forms.items()}
        manager = lower_graphs(found.graphs, inputs, quantization.soc)
        device = {
            "pte_bytes": len(manager.buffer),
            "device_sqnr_db": device_sqnr_db(found, bytes(manager.buffer), tokens),
        }
    return {
        "logits_vs_float_db": {
            "chunk": _db(exact, whole[0][0, start:]),
            "decode_transferred": _db(exact, moved),
            "decode_behind_prefill": _db(exact, behind_prefill),
            "decode_calibrated_on_itself": _db(exact, itself),
            "worst_step_loss_to_chunk": _worst(exact, whole[0][0, start:], moved),
            "worst_step_loss_behind_prefill": _worst(exact, whole[0][0, start:], behind_prefill),
            "worst_step_loss_to_itself": _worst(exact, itself, moved),
        },
        "encodings_that_differ": [f"{each.name}: {each.reason}" for each in differing],
        **device,
    }


def _joins(module: Any) -> set[Any]:
    from edgepass.passes.kv_pairs import kv_pairs_of

    return {join for _, join, _ in kv_pairs_of(module.graph)}


def _db(exact: torch.Tensor, found: torch.Tensor) -> float:
    return round(signal_to_noise_db(exact, found), 2)


def _worst(exact: torch.Tensor, reference: torch.Tensor, found: torch.Tensor) -> float:
    """The most that a step of ``found`` loses, in dB, to the same step of ``reference``."""
    steps = zip(exact, reference, found, strict=True)
    return round(max(_db(e, r) - _db(e, f) for e, r, f in steps), 2)


def whole(options: Any) -> dict[str, Any]:
    from edgepass.generation import generate, load_decoder

    model, tokenizer = load_model(options.model, layers=options.layers)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"][: options.tokens]
    choice = QnnOptions(
        recipe=options.recipe,
        kv_bits=options.kv_bits,
        context=options.tokens,
        prefill_chunk=options.chunk,
    )
    with measured() as usage:
        result = lower_for_qnn(model, choice, ids, model_name=options.model)
    result.save(options.out, tokenizer)
    text = generate(load_decoder(options.out), tokenizer, "The capital of France is", 16)
    return {
        "wall_s": round(usage.wall_seconds, 1),
        "cpu_s": round(usage.cpu_seconds, 1),
        "peak_rss_bytes": usage.peak_rss_bytes,
        "pte_bytes": len(result.buffer),
        "delegates": result.report["delegates"],
        "generated": vars(text),
    }


def chunk_perplexity(options: Any) -> dict[str, Any]:
    """Windows of ``--tokens``; the tokens to calibrate on follow those that are scored."""
    quantization = chosen_quantization(options)
    model, tokenizer = load_model(options.model, layers=options.layers)
    decoder = CacheIoDecoder(model, options.tokens)
    ids = read_tokens(tokenizer, options.text, options.scored + options.calibrated)
    scored, behind = ids[: options.scored], ids[options.scored :]
    chunk = decoder.form(options.tokens, options.tokens)
    prepared = quantization.prepare(export_form(chunk))
    usage = timed(lambda: observe(prepared, map(chunk.inputs, cut_texts(behind, options.tokens))))
    graph = quantization.convert(prepared)

    def fake_quantized(window: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return graph(*chunk.inputs(torch.tensor(window[:-1])))[0][0, : len(window) - 1]

    def of(logits: Any) -> float:
        return round(perplexity(scored, options.tokens, logits).perplexity, 4)

    return {
        "recipe": options.recipe,
        "kv_bits": options.kv_bits,
        "layers": decoder.layers,
        "window": options.tokens,
        "scored_tokens": len(scored),
        "calibration_tokens": len(behind) // options.tokens * options.tokens,
        "calibration": usage,
        "perplexity": of(fake_quantized),
        "perplexity_float": of(of_model(model)),
    }


if __name__ == "__main__":
    main()
