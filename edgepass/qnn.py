"""Lowering a decoder for Qualcomm's NPU: calibrate, carry the encodings over, lower, check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgepass.calibration.recipe_file import AnyRecipe
from edgepass.ops.encodings import EncodingTable
from edgepass.ops.encodings_file import write_encodings_file
from edgepass.ops.errors import InvalidArgumentError

if TYPE_CHECKING:
    from edgepass.calibration.calibrate import Calibration

BACKEND = "qnn"


@dataclass(frozen=True)
class QnnOptions:
    """How to lower for QNN.

    ``soc`` is a chip of the stock backend (``SM8650``), ``recipe`` a preset's name, a recipe
    file's path or a Recipe, whose block size and KV bits count if none are given here.
    ``block_size`` are the input features of an LPBQ block, ``layer_block_sizes`` others for some
    modules: keys are ends of their paths (``down_proj``), in which ``*`` stands for anything
    (``layers.0.*``), and the last that fits counts. ``prefill_chunk`` tokens are prefilled a call,
    ``context`` fit.
    ``calibration_threads`` are used while calibrating, instead of the best that a sweep finds.
    """

    soc: str = "SM8650"
    recipe: AnyRecipe = "16a4w_block"
    block_size: int | None = None
    kv_bits: int | None = None
    prefill_chunk: int = 128
    context: int = 1024
    layer_block_sizes: Mapping[str, int] = field(default_factory=dict)
    calibration_threads: int | None = None


@dataclass(frozen=True)
class QnnProgram:
    """A finished program: ``buffer`` (the ``.pte`` bytes), ``report``, ``encodings``."""

    buffer: bytes
    report: dict[str, Any]
    encodings: EncodingTable

    def save(self, folder: Any, tokenizer: Any = None) -> Any:
        """Write ``model.pte``, ``report.json``, ``encodings.json`` and the tokenizer, all at once.

        Raises OutputError if the folder cannot be written; nothing half-written stays.
        """
        from edgepass.lowering.lower import save_folder

        def write(staging: Any) -> None:
            write_encodings_file(staging / "encodings.json", self.encodings)

        return save_folder(folder, self.buffer, self.report, tokenizer, write)


def lower_for_qnn(
    model: Any,
    options: QnnOptions,
    tokens: Sequence[int] | Tensor,
    *,
    encodings: EncodingTable | None = None,
    check: bool = False,
    model_name: str | None = None,
    progress: Callable[[str], None] | None = None,
    calibration: Calibration | None = None,
) -> QnnProgram | None:
    """Lower a ``transformers`` causal language model for the HTP of ``options.soc``.

    ``tokens`` is the text to calibrate on: it is cut into chunks of the context, or is one shorter
    chunk. Vectors float ``[S, H]`` in their place (``embed_prompt`` makes them of a prompt with
    images) make a program that takes embeddings and no token ids. With ``encodings``, which an
    earlier lowering of the model in this recipe gave, nothing is calibrated, and the text serves
    the check only. With ``check`` both methods run in the HTP simulator against the fake-quantized
    graphs, and the SQNR in dB of each output is reported as ``numerics.device_sqnr_db``. With
    ``calibration`` an interrupted one is taken up. Returns None in the processes of ``torchrun``
    other than the first, once the calibration that they share is done.

    Raises LibraryError without the QNN libraries, InvalidArgumentError for options that do not fit,
    EncodingError for calibration data that gives no encodings or ``encodings`` of another model or
    recipe, CalibrationError for the checkpoint of another calibration.
    """
    from edgepass.lowering.qnn_libraries import prepare_libraries
    from edgepass.lowering.qnn_recipes import find_chip
    from edgepass.lowering.recipe_legality import check_modules
    from edgepass.lowering.stages import Stages

    recipe = check_options(options)
    check_vectors(model, tokens)
    check_modules(recipe.asked, model, BACKEND)
    stages = Stages(progress)
    prepare_libraries()
    soc = find_chip(options.soc)

    from edgepass.calibration.tuned_threads import tuned_threads
    from edgepass.lowering.qnn_decoder import quantize_decoder
    from edgepass.lowering.qnn_quantizer import QnnQuantization
    from edgepass.models.cache_decoder import CacheIoDecoder

    texts = cut_texts(tokens, options.context)
    count, threads = sum(map(len, texts)), options.calibration_threads
    with (
        stages.stage("calibrate"),
        tuned_threads(model, count, threads, chunk=len(texts[0])) as choice,
    ):
        quantization = QnnQuantization(
            recipe, soc, options.kv_bits, options.block_size, options.layer_block_sizes
        )
        decoder = CacheIoDecoder(model, options.context, embeddings=isinstance(tokens, Tensor))
        quantized = quantize_decoder(
            decoder, quantization, texts, options.prefill_chunk, calibration, encodings
        )
        if quantized is None:
            return None
    manager = _lower(quantized, soc, recipe, options, stages)
    buffer = bytes(manager.buffer)
    from edgepass.lowering.qnn_io import describe_io

    report = {
        "edgepass": version("edgepass"),
        "backend": BACKEND,
        "recipe": recipe.asked.name,
        "quantization": recipe.asked.asked(),
        "model": model_name,
        "soc": options.soc,
        "block_size": (options.block_size or recipe.block_size) if recipe.blocks else None,
        "block_size_for": dict(options.layer_block_sizes),
        "kv_bits": options.kv_bits or recipe.kv_bits,
        "context": options.context,
        "prefill_chunk": options.prefill_chunk,
        "vocabulary": int(model.config.vocab_size),
        "layers": decoder.layers,
        "inputs": "embeddings" if decoder.embeddings else "tokens",
        "hidden": int(model.config.hidden_size),
        "end_tokens": end_tokens(model),
        "calibration_tokens": count,
        "calibration_threads": choice.report(),
        "encodings": len(quantized.encodings),
        "io": describe_io(quantized),
        **_delegates(manager, quantized.forms),
        "pte_bytes": len(buffer),
        "stages": stages.rows,
        "numerics": {"device_sqnr_db": None},
    }
    if check:
        from edgepass.lowering.qnn_check import device_sqnr_db

        with stages.stage("check"):
            report["numerics"] = {"device_sqnr_db": device_sqnr_db(quantized, buffer, texts[0])}
    return QnnProgram(buffer, report, quantized.encodings)


def _lower(quantized: Any, soc: Any, recipe: Any, options: QnnOptions, stages: Any) -> Any:
    from edgepass.lowering.qnn_decoder import metadata
    from edgepass.lowering.qnn_lowering import lower_graphs

    with stages.stage("delegate"):
        bits = options.kv_bits or recipe.kv_bits
        facts = metadata(quantized, end_tokens(quantized.decoder.model), bits)
        examples = {
            name: form.inputs(_example(quantized, form.tokens))
            for name, form in quantized.forms.items()
        }
        fp16 = recipe.activation_bits is None
        return lower_graphs(quantized.graphs, examples, soc, facts, fp16=fp16)


def _example(quantized: Any, count: int) -> Tensor:
    decoder = quantized.decoder
    if decoder.embeddings:
        return torch.zeros(count, decoder.model.config.hidden_size)
    return torch.zeros(count, dtype=torch.int64)


def _delegates(manager: Any, forms: Any) -> dict[str, Any]:
    from edgepass.lowering.report import delegates, outside_delegates

    counts, outside = delegates(manager), outside_delegates(manager)
    return {
        "delegates": {name: counts[name] for name in forms},
        "outside_delegates": {name: outside[name] for name in forms},
    }


def check_options(options: QnnOptions) -> Any:
    """Return the recipe. Raises InvalidArgumentError for options that do not fit each other."""
    from edgepass.calibration.cpu_limits import cpu_limits
    from edgepass.calibration.thread_candidates import check_threads
    from edgepass.lowering.qnn_block_sizes import check_blocks
    from edgepass.lowering.qnn_recipes import check_kv_bits, find_qnn_recipe

    recipe = find_qnn_recipe(options.recipe)
    if recipe.asked.qat:
        raise InvalidArgumentError(
            f"got recipe={recipe.asked.name}, which trains; accepted is recipe="
            f"{recipe.asked.name.removesuffix('_qat')} here, or a graph that you train between "
            "prepare and convert of edgepass.lowering.qnn_quantizer.QnnQuantization"
        )
    if options.kv_bits is not None:
        check_kv_bits(recipe, options.kv_bits)
    check_blocks(recipe, options.block_size, options.layer_block_sizes)
    if options.calibration_threads is not None:
        check_threads("calibration_num_threads", options.calibration_threads, cpu_limits())
    if not 2 <= options.prefill_chunk < options.context:
        raise InvalidArgumentError(
            f"got prefill_chunk={options.prefill_chunk} for context={options.context}, accepted "
            f"are 2 to {options.context - 1}"
        )
    return recipe


def check_vectors(model: Any, tokens: Sequence[int] | Tensor) -> None:
    """Raise InvalidArgumentError for a tensor that is no text of the model's vectors."""
    if isinstance(tokens, Tensor):
        width = model.config.hidden_size
        if not tokens.is_floating_point() or tokens.dim() != 2 or tokens.shape[1] != width:
            raise InvalidArgumentError(
                f"no embeddings: got a tensor of {str(tokens.dtype).removeprefix('torch.')} "
                f"{list(tokens.shape)}, accepted are floats [S, {width}], or a list of token ids"
            )


def cut_texts(tokens: Sequence[int] | Tensor, context: int) -> list[Tensor]:
    """Cut ``tokens`` into chunks of ``context``, dropping a shorter rest; or one shorter chunk.

    Raises InvalidArgumentError for under two tokens.
    """
    if len(tokens) < 2:
        raise InvalidArgumentError(
            f"calibration text too short: got {len(tokens)} tokens, accepted are 2 and more"
        )
    length = min(context, len(tokens))
    whole = torch.as_tensor(tokens)[: len(tokens) // length * length]
    return list(whole.split(length))


def end_tokens(model: Any) -> list[int]:
    """The token ids that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def flat(inputs: Any) -> list[Tensor]:
    """The tensors of nested inputs, in the order of the graph's inputs."""
    return pytree.tree_leaves(inputs)
