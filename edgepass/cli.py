"""The command line: lower, run, eval, simulate, explain, analyze, allocate and smaller ones.

What needs torch is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from edgepass import __version__, console
from edgepass.cli_groups import encodings, recipes
from edgepass.cli_options import (
    Backend,
    GroupSize,
    Json,
    KeepBlocks,
    Layers,
    Model,
    RecipeName,
    TextTokens,
    Trust,
    WeightAlgorithm,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Lower language models to small, fast and right 4-bit ExecuTorch programs.",
)
app.add_typer(recipes, name="recipes")
app.add_typer(encodings, name="encodings")


def main() -> None:
    """Run the command line; an error that edgepass foresees is one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What libraries remark on the way is not for whoever waits for a result.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        app(prog_name="edgepass")
    except Exception as error:
        from edgepass.ops.errors import EdgepassError

        if not isinstance(error, EdgepassError):
            raise
        print(f"edgepass: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def lower(
    model: Model,
    backend: Backend,
    out: Annotated[Path, typer.Option(help="Folder for model.pte, tokenizer and report.json.")],
    recipe: RecipeName = "8da4w",
    group_size: GroupSize = None,
    context: Annotated[int, typer.Option(help="Tokens that the KV cache holds.")] = 1024,
    dtype: Annotated[str, typer.Option(help="fp32, or fp16 for vulkan.")] = "fp32",
    layers: Layers = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run the program on this host and report its accuracy.")
    ] = False,
    trust_remote_code: Trust = False,
    soc: Annotated[str, typer.Option(help="qnn: the chip.")] = "SM8650",
    block_size: Annotated[
        int | None, typer.Option(help="qnn: input features of an LPBQ block, not the recipe's.")
    ] = None,
    block_size_for: Annotated[
        list[str] | None,
        typer.Option(help="qnn: others for some modules, as down_proj=64 or 'layers.0.*=64'."),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="qnn: bits of the KV cache, 8 or 16, not the recipe's.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(help="qnn: tokens prefilled a call.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="The text or .jsonl to calibrate on: qnn, seqmse, gptq.")
    ] = None,
    calibration_tokens: TextTokens = None,
    encodings_file: Annotated[
        Path | None,
        typer.Option("--encodings", help="qnn: an encodings.json, in place of calibrating."),
    ] = None,
    calibration_num_threads: Annotated[
        int | None, typer.Option(help="qnn: calibrate with these, not with the best found.")
    ] = None,
    weight_algorithm: WeightAlgorithm = None,
    keep_blocks: KeepBlocks = False,
    as_json: Json = False,
) -> None:
    """Quantize, fuse and lower a model into a folder that `run` and `eval` read."""
    if backend == "qnn":
        from edgepass.lowering.qnn_block_sizes import read_block_sizes
        from edgepass.qnn import QnnOptions
        from edgepass.qnn_commands import check_foreign_options, lower_command

        check_foreign_options(
            backend,
            group_size=(group_size, None),
            dtype=(dtype, "fp32"),
            weight_algorithm=(weight_algorithm, None),
            keep_blocks=(keep_blocks, False),
        )
        _check_writable(out)
        sizes = read_block_sizes(block_size_for or ())
        threads = calibration_num_threads
        options = QnnOptions(
            soc, recipe, block_size, kv_bits, prefill_chunk, context, sizes, threads
        )
        tokens = 1024 if calibration_tokens is None else calibration_tokens
        report = lower_command(
            *(model, out, options, calibration, tokens),
            *(layers, trust_remote_code, check, encodings_file),
        )
        if report is not None:
            console.show(report, as_json, lambda: console.print_qnn_report(report, out))
        return
    with console.show_progress() as progress:
        progress("load")
        from edgepass import api
        from edgepass.qnn_commands import check_foreign_options
        from edgepass.weight_calibration import check_text, read_text

        chosen = api.check_options(backend, recipe, dtype, group_size, weight_algorithm)
        check_text(chosen, calibration, calibration_tokens)
        check_foreign_options(
            backend,
            soc=(soc, "SM8650"),
            block_size=(block_size, None),
            block_size_for=(block_size_for, None),
            kv_bits=(kv_bits, None),
            prefill_chunk=(prefill_chunk, 128),
            encodings=(encodings_file, None),
            calibration_num_threads=(calibration_num_threads, None),
        )
        _check_writable(out)
        loaded, tokenizer = api.load_model(
            model, layers=layers, trust_remote_code=trust_remote_code
        )
        result = api.lower(
            loaded,
            backend=backend,
            recipe=chosen,
            chunks=read_text(tokenizer, calibration, calibration_tokens),
            blocks=api.load_blocks(model, loaded) if keep_blocks else None,
            context=context,
            dtype=dtype,
            check=check,
            model_name=model,
            progress=progress,
        )
        progress("write")
        result.save(out, tokenizer)
    console.show(result.report, as_json, lambda: console.print_report(result.report, out))


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="A folder that `lower` wrote.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    as_json: Json = False,
) -> None:
    """Generate text with a lowered program on the stock ExecuTorch runtime."""
    from edgepass.generation import generate, load_decoder
    from edgepass.models.load import load_tokenizer

    decoder, tokenizer = load_decoder(folder), load_tokenizer(folder)
    console.tell_simulated(decoder.simulated)
    tell = None if as_json else console.Typewriter(prompt)
    result = vars(generate(decoder, tokenizer, prompt, max_new_tokens, on_text=tell))
    console.show(result, as_json, lambda: console.print_speed(result))


@app.command(name="eval")
def evaluate(
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    folder: Annotated[Path | None, typer.Argument(help="A folder that `lower` wrote.")] = None,
    model: Annotated[str | None, typer.Option(help="Or a model, run eagerly.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Quantize the eager model by it.")] = None,
    group_size: GroupSize = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Read this many tokens only.")] = None,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    weight_algorithm: WeightAlgorithm = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The UTF-8 text that seqmse and gptq are calibrated on.")
    ] = None,
    calibration_tokens: TextTokens = None,
    keep_blocks: KeepBlocks = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a text, by a lowered program or an eager model."""
    with console.show_progress() as progress:
        progress("load")
        from edgepass.evaluation import Subject, refuse_model_options
        from edgepass.ops.errors import InvalidArgumentError

        if (folder is None) == (model is None):
            raise InvalidArgumentError(
                f"one thing to evaluate: got folder={folder} and model={model}, accepted is "
                "either a folder or --model"
            )
        if folder is not None:
            refuse_model_options(
                recipe=recipe,
                group_size=group_size,
                layers=layers,
                trust_remote_code=trust_remote_code,
                weight_algorithm=weight_algorithm,
                calibration=calibration,
                calibration_tokens=calibration_tokens,
                keep_blocks=keep_blocks,
            )
            subject = Subject.of_folder(folder, context)
            console.tell_simulated(subject.simulated)
        else:
            subject = Subject.of_model(
                *(str(model), context, recipe, group_size, layers, trust_remote_code),
                *(weight_algorithm, calibration, calibration_tokens, keep_blocks),
            )
        result = subject.perplexity(text, context, max_tokens, partial(progress, "window"))
    shown = f"perplexity {result.perplexity:.4f} over {result.tokens} tokens"
    console.show(vars(result), as_json, lambda: print(shown))


@app.command()
def simulate(
    file: Annotated[Path, typer.Argument(help="A .pte with a Vulkan delegate.")],
    method: Annotated[str, typer.Option(help="The method to look at.")] = "forward",
    inputs: Annotated[
        Path | None, typer.Option(help="Run it on the arrays of this .npz, in their order.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write its outputs into this .npz.")] = None,
    ops: Annotated[bool, typer.Option("--ops", help="List the delegates' calls in order.")] = False,
    as_json: Json = False,
) -> None:
    """List what a Vulkan program holds and where its memory goes; run it on the CPU if asked."""
    from edgepass import simulation

    program = simulation.load(file, method)
    listed = simulation.describe(program, method, ops)
    if inputs is not None:
        listed["results"] = simulation.run(program, method, inputs, out)
    elif out is not None:
        simulation.refuse_out_alone(out)
    console.show(listed, as_json, lambda: console.print_inventory(listed))


@app.command()
def explain(
    model: Model,
    backend: Backend,
    recipe: RecipeName = "8da4w",
    group_size: GroupSize = None,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say for each linear whether it is fused, or the first reason why not."""
    with console.show_progress() as progress:
        progress("load")
        from edgepass import api

        chosen = api.check_options(backend, recipe, "fp32", group_size)
        loaded, _ = api.load_model(model, layers=layers, trust_remote_code=trust_remote_code)
        progress("export")
        program = api.export_quantized(loaded, chosen, api.short_context(loaded))
        progress("fuse")
        rows = api.explain(program, backend)
    console.show({"linears": rows}, as_json, lambda: console.print_linears(rows))


@app.command(name="tune-threads")
def tune_threads(
    model: Model,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens of the calibration; the sweep may cost 2 % of its time.")
    ] = 32768,
    context: Annotated[int, typer.Option(help="Tokens in a chunk, and behind a step.")] = 1024,
    budget: Annotated[
        float | None, typer.Option(help="Seconds that each sweep may cost, instead of 2 %.")
    ] = None,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show how fast the calibration and the decode step are with each thread count."""
    from edgepass import thread_commands

    with console.show_progress() as progress:
        tuning = thread_commands.tune_command(
            model, calibration_tokens, context, budget, layers, trust_remote_code, progress
        )
    console.show(tuning, as_json, lambda: thread_commands.print_tuning(tuning))


@app.command()
def analyze(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="A UTF-8 text or .jsonl to measure on.")],
    out: Annotated[Path, typer.Option(help="Folder for analysis.json.")],
    recipe: RecipeName = "8da4w",
    calibration_tokens: Annotated[int, typer.Option(help="Measure on this many.")] = 8192,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens in a chunk.")] = 512,
    exact: Annotated[
        int, typer.Option(help="Of so many of the most sensitive sites run the model, too.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random signs: the same give the same.")] = 0,
    sites: Annotated[
        list[str] | None, typer.Option(help="Only these, as '*.down_proj'; all by default.")
    ] = None,
    layers: Layers = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure how much quantizing each weight, activation and cache alone changes the logits."""
    from edgepass.analysis_commands import analyze_command, print_analysis

    _check_writable(out)
    found = analyze_command(
        *(model, recipe, calibration, calibration_tokens, chunk_tokens, out),
        *(exact, seed, sites or [], layers, trust_remote_code),
    )
    if found is not None:
        content = found.model_dump(mode="json", exclude_none=True)
        console.show(content, as_json, lambda: print_analysis(found, out))


@app.command()
def allocate(
    folder: Annotated[Path, typer.Argument(help="A folder that `analyze` wrote.")],
    backend: Annotated[str | None, typer.Option(help="Whose bytes and candidates.")] = None,
    target_mb: Annotated[float | None, typer.Option(help="10^6 bytes of weights.")] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Bits a weight, scales too.")] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Met at the smallest size: 0.05 is 5 %.")
    ] = None,
    same: Annotated[
        list[str] | None, typer.Option(help="qkv or gate_up: these agree within a layer.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="What is made least: loss (of texts like the analysed; default) or kl."),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write allocation.html, too.")] = False,
    as_json: Json = False,
) -> None:
    """Choose bits and groups for every weight: the best within a budget, as a recipe."""
    from edgepass.allocation_commands import allocate_command, print_allocation

    with console.show_progress() as progress:
        progress("allocate")
        result = allocate_command(
            *(folder, backend, target_mb, target_bpw, max_perplexity_increase),
            *(same or [], by, html),  # type: ignore[arg-type]  # checked by the problem
        )
    console.show(result, as_json, lambda: print_allocation(result, folder))


def _check_writable(out: Path) -> None:
    """Notice an output folder that cannot be written before the work begins, by trying."""
    from edgepass.ops.errors import OutputError

    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".edgepass.", dir=nearest).cleanup()
    except OSError as error:
        raise OutputError(
            f"cannot write: got out={out} ({error.strerror}: {nearest}), accepted are folders "
            "that exist or can be made"
        ) from error
